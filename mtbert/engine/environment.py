"""What a run ran on: code, versions, device and threads; a run is only repeated bit for bit on the same."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "mtbert")
_REPEATABLE = (
    "git",
    "device",
    "cpu_capability",
    "ranks",
    "threads",
    "precision",
    "kernels",
    "instruction_set",
)


def code_version(source: Path | None = None) -> str:
    """The commit (12 digits) of the checkout that this code runs from; `-dirty` when its files were changed.

    An mtbert that runs from no checkout gives the package's version. `source` is a file of the code.
    """
    source = Path(__file__) if source is None else source
    commit = _git(source.parent, "rev-parse", "--short=12", "HEAD")
    # A virtual environment inside of somebody's repository is no checkout of this project.
    if commit is None or _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return f"mtbert {_version('mtbert')}"
    changes = _git(source.parent, "status", "--porcelain", "--untracked-files=no")
    return commit if changes == "" else f"{commit}-dirty"


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The record for run.json: git, created, versions, platform, device, cpu_capability and threads.

    `device` is the hardware's name, `cpu_capability` the vector instructions in use, `threads` PyTorch's.
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "git": code_version(),
        "created": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": platform.python_version(), **versions, "torch": str(torch.__version__)},
        "platform": platform.platform(),
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def environment_differences(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two records, a phrase each: a resumed run may not continue bit for bit then."""
    defaults = {"ranks": 1}  # of records from before there could be several
    pairs = {
        name: (recorded.get(name, defaults.get(name)), current.get(name, defaults.get(name)))
        for name in _REPEATABLE
    }
    then, now = recorded.get("versions", {}), current.get("versions", {})
    pairs.update({f"version of {name}": (then.get(name), now.get(name)) for name in sorted({*then, *now})})
    return [f"{name}: {a} then, {b} now" for name, (a, b) in pairs.items() if a != b]


def device_name(device: torch.device | str) -> str:
    """The hardware's name, as its maker writes it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return _processor_name()
    return device.type


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks: a status must not write the index beneath somebody's own git command.
    variables = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=variables, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

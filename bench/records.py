"""What was measured on a device, kept in bench/results/DEVICE.json: the newest of every comparison and speedrun."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_FORMAT = 1
_DIGITS = 4


def slug(device: str) -> str:
    """A file name for a device: `AMD EPYC 9B14 (x2)` -> `amd-epyc-9b14-x2`, `NVIDIA H200` -> `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-") or "unknown"


def read(folder: Path, device: str) -> dict[str, Any]:
    """The record of a device; an empty one when there is none yet. Raises ValueError for another format."""
    path = folder / f"{slug(device)}.json"
    return read_file(path) if path.is_file() else {"format": _FORMAT, "device": device, "comparisons": {}}


def read_file(path: Path) -> dict[str, Any]:
    """The record in a file. Raises ValueError for another format."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != _FORMAT:
        raise ValueError(f"{path}: format {record.get('format')}, expected {_FORMAT}")
    return record


def write(folder: Path, device: str, name: str, comparison: dict[str, Any], facts: dict[str, Any]) -> Path:
    """Replace the result of comparison `name`, keep the others; returns the file.

    facts: what was measured on (versions, commit, date, load, tokens a step). Numbers are kept to four digits.
    """
    return _write(folder, device, "comparisons", name, {"measured": facts, **comparison})


def write_speedrun(folder: Path, device: str, name: str, found: dict[str, Any]) -> Path:
    """Replace the speedrun of this name; returns the file."""
    return _write(folder, device, "speedruns", name, found)


def _write(folder: Path, device: str, kind: str, name: str, found: dict[str, Any]) -> Path:
    record = read(folder, device)
    record[kind] = dict(sorted({**record.get(kind, {}), name: _rounded(found)}.items()))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(device)}.json"
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return value

"""Reading files that somebody else may have written: bounded, checked, kept inside their folder.

Nothing here unpickles, imports or follows a link out of a folder, and nothing is allocated by a size that a file
only claims: JSON is measured before it is parsed, and the header of a safetensors file says what its tensors are
before any of them is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtbert.errors import UserError

MOST_JSON_BYTES = 64 << 20
"""Of any JSON file of a model or a run: a tokeniser of a million words takes less."""
MOST_YAML_BYTES = 1 << 20
_MOST_DEPTH = 64  # of nested lists and objects: a configuration has four levels
_MOST_HEADER_BYTES = 64 << 20
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{1,15}")
_ELEMENT_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorFacts:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def own_file(folder: Path, name: str, error: type[UserError]) -> Path:
    """The path of a file of a folder, which need not exist. Raises `error` where it leads out of the folder.

    The folder itself may be a link. A file may be a link to a file in it, or, in a snapshot of the hub's cache, to one
    of the cache's blobs.
    """
    path = folder / name
    root, found = (Path(os.path.realpath(each)) for each in (folder, path))
    # models--OWNER--NAME/snapshots/REVISION/FILE -> models--OWNER--NAME/blobs/HASH
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(found.is_relative_to(each) for each in roots):
        raise error(f"{path}: leads out of its folder, to {found}; expected a file of the folder itself")
    return path


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, is in that folder, with all links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def read_text(path: Path, error: type[UserError], most: int) -> str:
    """The text (UTF-8) of a file of at most so many bytes; raises `error`, naming the file."""
    try:
        # Opened without waiting for whoever writes a pipe; what is no ordinary file is never read.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            data = file.read(most + 1) if path.is_file() else None
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    if data is None:
        raise error(f"{path}: expected a file, found something else")
    if len(data) > most:
        raise error(f"{path}: is larger than {most >> 20} MiB, the most that is read of such a file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: is not UTF-8 text (byte {problem.start})") from None


def parse_json(text: str, path: Path, error: type[UserError]) -> Any:
    """The value of a JSON text; raises `error`, naming the file, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise error(f"{path}: is not usable JSON (nested too deeply)") from None
    except ValueError as problem:
        raise error(f"{path}: is not JSON ({problem})") from None


def read_json_object(path: Path, error: type[UserError], most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file; raises `error`, naming the file."""
    found = parse_json(read_text(path, error, most), path, error)
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_yaml_object(path: Path, error: type[UserError]) -> dict[str, Any]:
    """The mapping in a YAML file of plain values; raises `error`, naming the file.

    Tags of Python objects are errors, and so are anchors: a small text of them stands for a huge value.
    """
    return parse_yaml_object(read_text(path, error, MOST_YAML_BYTES), path, error)


def parse_yaml_object(text: str, path: Path, error: type[UserError]) -> dict[str, Any]:
    """The mapping in the text of such a file."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise error(f"{path}: anchors and aliases are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_DEPTH:
                raise error(f"{path}: is nested more than {_MOST_DEPTH} levels deep")
        found = yaml.safe_load(text) or {}
    except yaml.YAMLError as problem:
        raise error(f"{path}: not a YAML file of plain values ({_in_one_line(problem)})") from None
    except (ValueError, TypeError, OverflowError) as problem:  # a number or a date that Python cannot hold
        raise error(f"{path}: holds an impossible value ({problem!s:.200})") from None
    if not isinstance(found, dict):
        raise error(f"{path}: expected fields with values, found {type(found).__name__}")
    return found


def tensor_facts(path: Path, error: type[UserError]) -> dict[str, TensorFacts]:
    """Dtype and shape of every tensor of a safetensors file, from its header alone; raises `error`, naming the file.

    The sizes are checked against each other and against the file's own, so that whoever reads a tensor of these facts
    allocates no more than the file holds.
    """
    damaged = f"{path}: is truncated or not a safetensors file"
    try:
        if not path.is_file():
            raise error(f"{path}: there is no such file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
                raise error(f"{damaged} (its header cannot have {length:,} bytes)")
            header = file.read(length)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from None
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as problem:
        raise error(f"{damaged} (its header is no JSON: {type(problem).__name__})") from None
    if not isinstance(entries, dict):
        raise error(f"{damaged} (its header is no JSON object)")
    facts = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        found = _facts_of(entry, size - 8 - length)
        if found is None:
            raise error(f"{damaged} (what it says of tensor {name[:80]!r} is impossible)")
        facts[name] = found
    return facts


def _facts_of(entry: Any, room: int) -> TensorFacts | None:
    """One entry of a header, or None where it cannot be true of a file with that many bytes of data."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = (
        entry.get("dtype"),
        _counts(entry.get("shape")),
        _counts(entry.get("data_offsets")),
    )
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or shape is None or offsets is None:
        return None
    if len(shape) > 8 or len(offsets) != 2 or not offsets[0] <= offsets[1] <= room:
        return None
    if max(shape, default=0) > room + 1:
        return None
    if dtype in _ELEMENT_BYTES and math.prod(shape) * _ELEMENT_BYTES[dtype] != offsets[1] - offsets[0]:
        return None
    return TensorFacts(dtype, shape)


def _counts(values: Any) -> tuple[int, ...] | None:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        return None
    return tuple(values)


def _in_one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())

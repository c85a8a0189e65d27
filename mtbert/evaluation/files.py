"""The files of a report, each written as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

from mtbert.engine.durable import replace_file
from mtbert.errors import UserError


def write_bytes(path: Path, data: bytes) -> Path:
    """Write `data` to `path`, making its folder; a reader never meets half of it. Returns `path`.

    Raises UserError with the system's reason (no space, no permission) and the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def write_text(path: Path, text: str) -> Path:
    """The same for text: UTF-8, line ends as they are in `text` on every system."""
    return write_bytes(path, text.encode("utf-8"))

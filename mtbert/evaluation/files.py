"""Text files written beside their place and renamed, so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from mtbert.errors import UserError


def write_text(path: Path, text: str) -> Path:
    """Write `text` (UTF-8, `\\n` line ends on every system) to `path`, making its folder; returns `path`.

    Raises UserError with the system's reason (no space, no permission) and the path.
    """
    beside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path

"""Files that survive a crash: written beside, flushed to the disk, and renamed into place."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has neither fcntl nor folders that can be flushed
    _FULL_SYNC = None
else:
    # macOS's fsync leaves the data in the drive's own cache; this command empties that too.
    _FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)


def sync_file(descriptor: int) -> None:
    """Flush an open file to the disk. Raises OSError, also for an earlier write that failed only now."""
    if _FULL_SYNC is not None:
        with contextlib.suppress(OSError):  # network volumes refuse it; they take the ordinary fsync
            fcntl.fcntl(descriptor, _FULL_SYNC)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new names, renames, deletions) to the disk. Raises OSError."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` the content `data`: after a crash it holds the old content or the new one, never a part.

    Raises OSError; the old content is still there then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)

"""A lock on a folder that the operating system releases when the process ends, in whatever way it ends."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

try:
    import fcntl
except ImportError:
    import msvcrt

    _WINDOWS_OFFSET = 1 << 30  # bytes locked on Windows cannot be read: lock one far behind the text

_held: set[FolderLock] = set()


class FolderLock:
    """An exclusive lock on `folder`, by a file `.lock` in it that also says who holds it.

    The file stays when the lock is released: deleting it would let two processes lock two different files.
    A volume that knows no locks (some network volumes) grants every lock.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Take the lock; returns None, or who holds it ("process 12 on host since ..."). Raises OSError."""
        if self._descriptor is not None:
            return None
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(descriptor):
                text = os.read(descriptor, 1000).decode("utf-8", "replace").strip()
                os.close(descriptor)
                return text or "another process"
            os.ftruncate(descriptor, 0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {now}\n".encode())
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        return None

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(self)


def _lock(descriptor: int) -> bool:
    try:
        if os.name == "nt":
            os.lseek(descriptor, _WINDOWS_OFFSET, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True


def _close_in_child() -> None:
    """A forked worker shares the lock: it would keep it when the parent is killed and the worker lives on."""
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)

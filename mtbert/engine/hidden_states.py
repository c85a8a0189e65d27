"""Hidden states of a table's rows in one file: written once, then read through a memory map.

The file is a header, then [tokens, C] in the computer's byte order. The header holds a magic, the key (what the states
are a function of), the SHA-256 of what follows, and the sizes. It is written beside, flushed and renamed, so that a
file under its name is whole; one that is not is recognised by its size or its digest, and made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtbert.engine.durable import sync_file, sync_folder
from mtbert.engine.folder_lock import FolderLock

logger = logging.getLogger(__name__)

_MAGIC = b"mtbert-hidden-1\n"
_HEADER = struct.Struct("<16s32s32sqq16s16x")
_SUFFIX = ".hidden"
_WAIT = 0.5  # seconds between two looks at a folder that another process has locked


@dataclass(frozen=True)
class StatesKey:
    """Which hidden states: a digest of all that they depend on, and their sizes."""

    digest: bytes
    """SHA-256."""
    tokens: int
    width: int
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes of the states."""
        return self.tokens * self.width * self.dtype.itemsize

    def header(self, payload: bytes) -> bytes:
        """The file's first bytes; payload: the SHA-256 of the others."""
        name = str(self.dtype).removeprefix("torch.").encode()
        return _HEADER.pack(_MAGIC, self.digest, payload, self.tokens, self.width, name)


class StatesFolder:
    """Files of hidden states by key; a lock makes sure that one process at a time computes and makes room."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, key: StatesKey, *, warn: bool) -> np.ndarray | None:
        """The states as a read-only map, uint8 [tokens, C x bytes of the dtype]; None where there is no intact file.

        warn: whether to say what is wrong with a file that is there.
        """
        path = self._path(key)
        try:
            # Indexing np.memmap itself is several times as slow as a plain array over the same pages.
            data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            if warn:
                logger.warning("%s cannot be used (%s): it is computed again", path, error)
            return None
        payload = data[_HEADER.size :]
        expected = _HEADER.size + key.size
        if len(data) != expected:
            problem = f"it has {len(data):,} bytes, expected {expected:,}"
        elif data[: _HEADER.size].tobytes() != key.header(hashlib.sha256(payload.data).digest()):
            problem = "its header does not fit its content"
        else:
            with contextlib.suppress(OSError):
                os.utime(path)  # what was used last is the last to be deleted
            return payload.reshape(key.tokens, key.width * key.dtype.itemsize)
        if warn:
            logger.warning("%s is damaged (%s): it is computed again", path, problem)
        return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder alone; waits for another process that does. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(self.folder)
        holder = lock.acquire()
        if holder is not None:
            logger.info("%s: waiting for %s, which writes into it", self.folder, holder)
        while holder is not None:
            time.sleep(_WAIT)
            holder = lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def make_room(self, keys: Iterable[StatesKey], most: float) -> None:
        """Delete the files that were used longest ago, none of these, until all together take at most `most` bytes.

        What a killed process left unfinished goes, too. The lock must be held.
        """
        wanted = {self._path(key): key.size for key in keys}
        left = most - sum(wanted.values())
        others = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # somebody else may delete, too
                if path.name.endswith(".partial"):
                    path.unlink()
                elif path.suffix == _SUFFIX and path not in wanted:
                    found = path.stat()
                    others.append((found.st_mtime, found.st_size, path))
        for _, size, path in sorted(others, reverse=True):
            left -= size
            if left < 0:
                logger.info("%s makes room: %s bytes", path, f"{size:,}")
                with contextlib.suppress(OSError):
                    path.unlink()

    def store(self, key: StatesKey, parts: Iterable[Tensor]) -> None:
        """Write the states, given in stretches [t, C] in the order of the file. Raises OSError.

        The whole size is asked of the disk before the first stretch is computed.
        """
        descriptor, partial = tempfile.mkstemp(suffix=".partial", dir=self.folder)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                _reserve(descriptor, _HEADER.size + key.size)
                file.seek(_HEADER.size)
                digest, written = hashlib.sha256(), 0
                for part in parts:
                    data = part.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data
                    digest.update(data)
                    _write_all(file, data)
                    written += len(data)
                if written != key.size:
                    raise ValueError(f"hidden states of {written:,} bytes, expected {key.size:,}")
                file.seek(0)
                _write_all(file, memoryview(key.header(digest.digest())))
                sync_file(descriptor)
            os.replace(partial, self._path(key))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        sync_folder(self.folder)

    def _path(self, key: StatesKey) -> Path:
        return self.folder / f"{key.digest.hex()}{_SUFFIX}"


def _reserve(descriptor: int, size: int) -> None:
    """Make sure that the disk has so many bytes, where the system can tell. Raises OSError."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(file: io.RawIOBase, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]

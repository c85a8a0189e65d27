"""Every answer of a model, by its request, in a file that is only ever appended to: a killed job asks nothing twice."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mtbert.engine.durable import sync_file
from mtbert.errors import DataError, UserError

try:
    import fcntl
except ImportError:  # Windows: two jobs with one cache are not noticed
    fcntl = None  # type: ignore[assignment]

SYNC_SECONDS = 1.0
"""A killed process loses nothing; a machine without power loses what came in since the last flush to the disk."""

_STARTS = (b'{"key": ', b'{"note": ')


def request_key(request: Mapping[str, Any]) -> str:
    """The sha256 of a request: of all that its answer depends on."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class AnswerCache:
    """A file of JSON lines: answers, `{"key": ..., "answer": {...}}`, and notes, `{"note": ..., "value": ...}`.

    An incomplete last line, which a killed process or a full disk leaves, is cut off; another line that cannot be read
    is passed over with a warning, so that its request is sent again.
    """

    def __init__(self, path: Path) -> None:
        """Opens, or makes, the file. Raises UserError where that is not possible, or another process has it open."""
        self.path = path
        self._answers: dict[str, dict[str, Any]] = {}
        self._notes: dict[str, Any] = {}
        self._synced = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: io.FileIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: the answers cannot be kept there: {error.strerror or error}") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Number of answers."""
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer to a request, if it was given before."""
        return self._answers.get(key)

    def put(self, key: str, answer: dict[str, Any]) -> None:
        """Keep an answer. Raises UserError, naming the file, when it cannot be written."""
        self._append({"key": key, "answer": answer})
        self._answers[key] = answer

    def note(self, name: str) -> Any:
        """What was noted under a name; None where nothing was."""
        return self._notes.get(name)

    def put_note(self, name: str, value: Any) -> None:
        """Keep a fact about the server."""
        self._append({"note": name, "value": value})
        self._notes[name] = value

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            try:
                sync_file(self._file.fileno())
            except OSError as error:
                raise self._unwritable(error) from error
            finally:
                self._file.close()

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"  # ASCII: an answer may hold halves of characters
        try:
            size = self._file.seek(0, os.SEEK_END)
            try:
                written = 0
                while written < len(line):  # a disk that fills up takes a part first
                    written += self._file.write(line[written:])
            except OSError:
                self._file.truncate(size)
                raise
            if time.monotonic() - self._synced > SYNC_SECONDS:
                sync_file(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.path}: an answer cannot be kept: {error.strerror or error}")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{self.path}: another process is using these answers; wait for it, or give another --cache"
            ) from None
        except OSError:
            pass  # a volume without locks

    def _read(self) -> None:
        self._file.seek(0)
        data = self._file.readall()
        if data and not any(start.startswith(data[: len(start)]) for start in _STARTS):
            raise DataError(
                f"{self.path}: holds no answer of this program; expected a file that --cache has made before"
            )
        end = data.rfind(b"\n") + 1
        if end < len(data):
            warnings.warn(f"{self.path}: the last line is incomplete and is cut off", stacklevel=3)
            self._file.truncate(end)
        for number, line in enumerate(data[:end].splitlines(), start=1):
            try:
                entry = json.loads(line)
                if "note" in entry:
                    self._notes[entry["note"]] = entry["value"]
                elif isinstance(entry["answer"]["text"], str):
                    self._answers[entry["key"]] = entry["answer"]
                else:
                    raise ValueError("its text is no string")
            except (ValueError, TypeError, KeyError):
                warnings.warn(
                    f"{self.path}, line {number}: is no answer of this program and is passed over",
                    stacklevel=3,
                )

"""metrics.jsonl: what a run measured, one JSON object a line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mtbert.engine.durable import replace_file, sync_file
from mtbert.errors import UserError


def plain(value: Any) -> Any:
    """The value as JSON can hold it; raises TypeError for others.

    NumPy's and torch's scalars become Python's, arrays and tuples become lists, NaN and the infinities
    become None (null), because JSON has no words for them and other programs refuse Python's.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON: {value!r}")


class MetricsLog:
    """Appends records to a run's metrics.jsonl, each handed to the operating system at once.

    So a killed process loses nothing; a torn last line (the machine lost power) is cut off when the file is
    opened again. Resuming: everything about step n is appended before the checkpoint of step n is saved
    (`sync` puts it on the disk), and `rewind(n)` takes away what came after it, so that the resumed run's
    file equals that of a run without interruption in everything but times.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, which need not exist. Raises UserError."""
        self.path = Path(path)
        try:
            self._file = self.path.open("ab", buffering=0)
            self._cut_torn_line()
        except OSError as error:
            raise self._failure(error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record (see `plain` for the values). Raises UserError when the disk refuses."""
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
        end = self._end()
        try:
            written = self._file.write(line)
            while written < len(line):  # a full disk takes a part first and refuses the rest
                written += self._file.write(line[written:])
        except OSError as error:
            os.truncate(self.path, end)
            raise self._failure(error) from error

    def sync(self) -> None:
        """Flush all records to the disk, to survive a power failure. Raises UserError."""
        try:
            sync_file(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def rewind(self, step: int) -> int:
        """Drop the records of later steps than `step`, and damaged lines; returns how many lines went.

        Records without a step stay. The file is replaced as a whole: a crash leaves the old one or the new
        one.
        """
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                self._file.close()
                replace_file(self.path, b"".join(kept))
                self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise self._failure(error) from error
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _end(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _cut_torn_line(self) -> None:
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def _failure(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror or error}")


def _step_of(line: bytes) -> float:
    """The step of a line; minus infinity for a record without one, infinity for a damaged line."""
    try:
        record = json.loads(line)
    except ValueError:
        return math.inf
    if not isinstance(record, dict) or not line.endswith(b"\n"):
        return math.inf
    step = record.get("step")
    return step if isinstance(step, int) else -math.inf

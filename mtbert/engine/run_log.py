"""What a run says: short lines on the console, the same with the time in the run's log.txt.

Modules log through `logging.getLogger(__name__)`; everything under `mtbert` is shown, Python's warnings as
well.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TextIO

from tqdm import tqdm

from mtbert.errors import UserError

_warnings_log = logging.getLogger("mtbert.warnings")


class _ConsoleHandler(logging.Handler):
    """Writes to a standard stream; an active progress bar is cleared for the line and drawn again below it."""

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        # When the pipe's reader has gone or the stream is closed, the training goes on.
        with contextlib.suppress(OSError, ValueError):
            stream = getattr(sys, self._stream)
            tqdm.write(message, file=stream)
            stream.flush()


class _ShortFormatter(logging.Formatter):
    """The message alone; from WARNING on with its level before it."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class _FileHandler(logging.Handler):
    """log.txt. Lines that can't be written (a full disk) are left out, and that is said once.

    logging.FileHandler would keep them in a buffer and raise when it is closed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._complained = False

    def emit(self, record: logging.LogRecord) -> None:
        line = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
        try:
            self._file.write(line)
        except OSError as error:
            if not self._complained:
                self._complained = True
                sys.stderr.write(f"warning: {self._path} cannot be written: {error.strerror or error}\n")

    def close(self) -> None:
        super().close()
        self._file.close()


@contextlib.contextmanager
def logging_to(path: Path | None, *, level: int = logging.INFO, rank: int = 0) -> Iterator[logging.Logger]:
    """While the context is open, show messages on the console and append them to `path`.

    Without a path they go to standard error: what such a program prints are its answers.

    rank: of several processes the first alone does so; the others show their errors on standard error, with their rank.

    Yields the logger `mtbert`. Nothing stays changed afterwards. Raises UserError if `path` can't be opened.
    """
    if rank:
        path, level = None, logging.ERROR
    console = _ConsoleHandler("stderr" if path is None else "stdout")
    console.setFormatter(_ShortFormatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    handlers: list[logging.Handler] = [console]
    if path is not None:
        try:
            file = _FileHandler(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(file)
    logger = logging.getLogger("mtbert")
    level_before = logger.level
    logger.setLevel(level)
    show_before, warnings.showwarning = warnings.showwarning, _show_warning
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.setLevel(level_before)
        warnings.showwarning = show_before
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _warnings_log.warning("%s (%s, %s:%d)", message, category.__name__, filename, lineno)

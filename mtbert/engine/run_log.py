"""What a run says: short lines on the console, the same with the time in the run's log.txt.

Modules log through `logging.getLogger(__name__)`; everything under `mtbert` is shown, Python's warnings as
well.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mtbert.errors import UserError

_SHOWN = ("mtbert", "py.warnings")


class _ConsoleHandler(logging.Handler):
    """Writes to standard output; an active progress bar is cleared for the line and drawn again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        # When the pipe's reader has gone or the stream is closed, the training goes on.
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()


class _ShortFormatter(logging.Formatter):
    """The message alone; from WARNING on with its level before it."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return f"{record.levelname.lower()}: {message}" if record.levelno >= logging.WARNING else message


class _LogFileHandler(logging.FileHandler):
    """log.txt. When it can't be written (a full disk) it says so once and gives up: no run ends for that."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL + 1)
        sys.stderr.write(f"warning: {self.baseFilename} cannot be written any more: {sys.exc_info()[1]}\n")


@contextlib.contextmanager
def logging_to(path: Path | None, *, level: int = logging.INFO) -> Iterator[logging.Logger]:
    """While the context is open, show messages on the console and append them to `path` (None: console only).

    Yields the logger `mtbert`. Nothing stays changed afterwards. Raises UserError if `path` can't be opened.
    """
    console = _ConsoleHandler()
    console.setFormatter(_ShortFormatter("%(message)s"))
    handlers: list[logging.Handler] = [console]
    if path is not None:
        try:
            file = _LogFileHandler(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(file)
    loggers = [logging.getLogger(name) for name in _SHOWN]
    before = [(logger.level, logger.propagate) for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.setLevel(level)
        for handler in handlers:
            logger.addHandler(handler)
    loggers[1].propagate = False
    try:
        yield loggers[0]
    finally:
        logging.captureWarnings(False)
        for logger, (old_level, old_propagate) in zip(loggers, before, strict=True):
            logger.setLevel(old_level)
            logger.propagate = old_propagate
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()

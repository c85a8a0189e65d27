"""Ends that come from outside: signals, and memory that runs out."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from mtbert.errors import UserError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second Ctrl-C stops at once. Handlers are put back afterwards."""
    event = threading.Event()

    def request(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        logger.info("%s: stopping after this step", signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_with_parent(parent: int) -> None:
    """From now on, SIGTERM for this process when the process `parent`, which started it, is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.name != "nt":  # there, a process keeps the number of a parent that is gone
        threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def memory_errors(max_tokens: int) -> Iterator[None]:
    """Turn running out of memory into a message that names the token budget."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(_out_of_memory(max_tokens, error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise UserError(_out_of_memory(max_tokens, error)) from error


def _out_of_memory(max_tokens: int, error: BaseException) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"out of memory with a token budget of {max_tokens} tokens a pass; a lower --max_tokens takes"
        f" more passes a step with the same result ({reason})"
    )

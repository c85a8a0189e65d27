"""Ranks in processes of their own that serve many cases: forked from one process that has the imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Case = Callable[..., Any]
"""A function of a module that the ranks can import: gets the world and its arguments, the same on every rank."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class RankGroup:
    """`size` ranks that wait for cases."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mtbert.train", "support.rank_cases"])
        port = free_port()
        self.size = size
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, case: Case, *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """What the case gives on each rank; an AssertionError with all tracebacks when it fails on one."""
        for pipe in self._pipes:
            pipe.send((case, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(timeout), f"rank {rank} of {self.size} did not answer in {timeout} s"
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()


@contextlib.contextmanager
def rank_group(size: int) -> Iterator[RankGroup]:
    """Ranks for the time of a `with`."""
    group = RankGroup(size)
    try:
        yield group
    finally:
        group.close()


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    import torch

    from mtbert.engine.distributed import Ranks

    os.environ.update(environment_of(rank, size, port))
    torch.set_num_threads(1)
    with Ranks.joined() as world:
        while (message := pipe.recv()) is not None:
            case, arguments = message
            try:
                pipe.send((True, case(world, *arguments)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))

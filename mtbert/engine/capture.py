"""Work on a device recorded by its shape, and done again from the record: what graphs of steps and of passes share.

Recorded work is a list of kernels with fixed addresses. So whatever differs from one time to the next is a tensor in a
buffer that stays where it is, nothing is read back from the device, and nothing is kept in Python. Every shape is first
done a few times as it will be recorded, on the same stream, but without a graph: kernels get compiled, and what lives
on between two times comes into being.
"""

from __future__ import annotations

import logging
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")
Given = TypeVar("Given")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Recorded:
    """Work that can be done again."""

    result: Any
    """What the work has returned: tensors that a replay writes to again."""
    replay: Callable[[], None]
    done: bool
    """Whether recording has done the work, too."""


class Recorder(Protocol):
    """A way to record work on a device."""

    def run(self, work: Callable[[], T]) -> T:
        """Do the work as it would be recorded."""

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Record it. Raises RuntimeError, and has then done nothing, for work that cannot be recorded."""


class CudaRecorder:
    """CUDA graphs, on a stream of their own; all share one pool of memory, because only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._sharing: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """The graphs that live in the pool."""

    def run(self, work: Callable[[], T]) -> T:
        """Do it on the stream of the graphs."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Capture it; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        if not self._sharing:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        result, failure = None, None
        try:
            # thread_local: the thread that makes input ready allocates pinned memory meanwhile, which is none of this.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    result = work()
                except (
                    BaseException
                ) as error:  # the end of a capture that it broke raises, too, and says less
                    failure = error
        except RuntimeError as error:
            failure = failure or error
        finally:
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own when the capture's end raises
        if failure is None:
            self._sharing.add(graph)
            return Recorded(result, graph.replay, done=False)
        self._sharing.clear()  # what a broken capture has left in the pool is no other graph's
        if not isinstance(failure, Exception):
            raise failure
        # Without its frames, which hold the tensors of the capture.
        raise RuntimeError(str(failure) or repr(failure)) from failure.with_traceback(None)


class Work(ABC, Generic[Given, Result]):
    """Work of one shape: its buffers, and what was recorded."""

    def __init__(self, name: str) -> None:
        self.name = name
        """For the log."""
        self.taken = 0
        """How often it was done without a record."""
        self.recorded: Recorded | None = None
        self.problem = ""
        """Why it cannot be recorded."""

    @abstractmethod
    def load(self, given: Given) -> None:
        """Put what is given into the buffers."""

    @abstractmethod
    def compute(self) -> Tensor:
        """Do it on what the buffers hold: all numbers of the result in one tensor [n]."""

    @abstractmethod
    def result(self, flat: Tensor, given: Given) -> Result:
        """The result of what was given, read from its numbers [n]."""


class Captures(Generic[Given, Result]):
    """Work by shape, each recorded after `warm_up` times; at most so many shapes."""

    def __init__(self, recorder: Recorder, *, most: int, warm_up: int) -> None:
        self.counts: Counter[str] = Counter()
        """How often work was `replayed`, `warm-up`, or done one operation after the other, by the reason."""
        self._recorder = recorder
        self._most, self._warm_up = most, warm_up
        self._works: dict[object, Work[Given, Result]] = {}

    def forget(self) -> None:
        """Drop all records: what they read or write has been replaced."""
        self._works.clear()

    def summary(self) -> str:
        """How the work was done."""
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.most_common()) or "none"

    def _attempt(self, key: object, begin: Callable[[], Work[Given, Result]], given: Given) -> Result | None:
        """The result of the work of a shape; None, counted with the reason, where it must be done without.

        begin: makes the shape's work when it is met for the first time.
        """
        work = self._works.get(key)
        if work is None:
            if len(self._works) == self._most:
                self._refused(f"more than {self._most} shapes")
                return None
            work = self._works[key] = begin()
        if work.problem:
            self._refused(work.problem)
            return None
        work.load(given)
        if work.recorded is not None:
            work.recorded.replay()
        elif work.taken < self._warm_up:
            work.taken += 1
            self.counts["warm-up"] += 1
            return work.result(self._recorder.run(work.compute), given)
        else:
            try:
                work.recorded = self._recorder.record(work.compute)
            except RuntimeError as error:
                reason = str(error).splitlines()[0] if str(error) else repr(error)
                work.problem = f"capture failed: {reason}"
                logger.warning("graphs: %s is not captured: %s", work.name, work.problem)
                self._refused(work.problem)
                return None
            if not work.recorded.done:
                work.recorded.replay()
        self.counts["replayed"] += 1
        return work.result(work.recorded.result.clone(), given)  # the next replay writes over it

    def _refused(self, reason: str) -> None:
        self.counts[f"eager ({reason})"] += 1

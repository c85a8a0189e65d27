"""Seconds that a call takes: on a GPU by events, from a cold L2 cache, without the host's share; else by the clock."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.measure import Side
from mtbert.engine.peaks import plain_copy

_COLD_BYTES = 512 << 20
"""Several times the L2 of any GPU. Reading this much also takes longer than the host needs for the launches behind
it, so that the device never waits for the host between the two events."""


class Stopwatch:
    """A clock that only `measure` moves on, by the median of some runs."""

    def __init__(self, device: torch.device, runs: int) -> None:
        self.device = device
        self.runs = runs
        self._now = 0.0
        self._flush = torch.ones(_COLD_BYTES // 4, device=device) if device.type == "cuda" else None

    def __call__(self) -> float:
        """Seconds measured so far."""
        return self._now

    def measure(self, call: Callable[[], object]) -> float:
        """The median of the seconds that a run of `call` takes."""
        seconds = statistics.median(self._run(call) for _ in range(self.runs))
        self._now += seconds
        return seconds

    def _run(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        # A read, not a write: lines that were written would go back to memory during the measured run.
        self._flush.amax()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3


def prepare(call: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], bool]:
    """The call with its compilation behind it; on a GPU as a graph, where it can be captured (then True)."""
    if device.type != "cuda":
        call()
        return call, False
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if not _captured(graph, call, stream):
        _forget_failed_capture(stream)
        return call, False
    return graph.replay, True


def _captured(graph: torch.cuda.CUDAGraph, call: Callable[[], object], stream: torch.cuda.Stream) -> bool:
    """Capture the call; False where it asks the device for something on the way, which no graph can hold.

    Not by `torch.cuda.graph`, which leaves the capture's stream in force when the capture fails.
    """
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            call()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            return False
        try:
            graph.capture_end()
        except RuntimeError:
            return False
    return True


def _forget_failed_capture(stream: torch.cuda.Stream) -> None:
    """Let the random number generator leave the state of a capture: only the end of a good one does that."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph, numbers = torch.cuda.CUDAGraph(), torch.empty(1, device="cuda")
        graph.capture_begin()
        numbers.normal_()
        graph.capture_end()
    torch.cuda.synchronize()


def timed_side(
    name: str,
    call: Callable[[], object],
    stopwatch: Stopwatch,
    work: float,
    bytes_moved: float | None = None,
) -> Side:
    """A side that does `work` a run. Figures: microseconds; GB/s, where `bytes_moved` is what a run has to move."""
    ready, captured = prepare(call, stopwatch.device)
    side = Side(name, lambda _: work)
    seconds: list[float] = []

    def run(repeat: int) -> float:
        seconds.append(stopwatch.measure(ready))
        median = statistics.median(seconds)
        side.figures["microseconds"] = 1e6 * median
        if bytes_moved is not None:
            side.figures["gigabytes_per_second"] = bytes_moved / median / 1e9
        return work

    if stopwatch.device.type == "cuda" and not captured:
        side.figures["without_a_graph"] = 1.0
    side.run = run
    return side


def copy_side(name: str, stopwatch: Stopwatch, work_per_byte: float) -> Side:
    """A plain copy of a large tensor: bytes read plus bytes written, as work."""
    copy = plain_copy(stopwatch.device)
    return timed_side(name, copy.run, stopwatch, copy.amount * work_per_byte, copy.amount)


def fastest_product(
    name: str, stopwatch: Stopwatch, dtype: torch.dtype, shapes: list[tuple[int, int, int]]
) -> Side:
    """The matrix product of these (m, n, k) with the highest rate; its work is FLOPs."""
    sides = []
    for m, n, k in shapes:
        a, b = (torch.randn(rows, k, device=stopwatch.device).to(dtype) for rows in (m, n))
        out = torch.empty(m, n, dtype=dtype, device=stopwatch.device)

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> Tensor:
            return torch.mm(a, b.t(), out=out)

        flops = 2.0 * m * n * k
        sides.append(timed_side(name, multiply, stopwatch, flops))
        sides[-1].run(0)
    return max(sides, key=lambda side: side.run(0) / side.figures["microseconds"])

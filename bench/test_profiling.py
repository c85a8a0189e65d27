"""What ranges cost: nothing to speak of where nobody listens, and little where somebody does.

`listened to` names every range as `--profile nvtx` does, and hands the names to nobody; `with nvtx` is that profile
itself, without a profiler behind it. What a range costs that nobody listens to is too little to be seen beside a step:
it is counted, a call at a time, and multiplied.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, own_side
from bench.test_train_step import DTYPES, fast
from mtbert.engine.nvtx_ranges import NvtxRanges
from mtbert.engine.precision import Precision
from mtbert.engine.range_tree import Label, RangeTree
from mtbert.ranges import listening, operation, span

__all__ = ["fast"]

_CALLS = 100_000


class Unheard(RangeTree):
    """Names and nests every range, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = 0

    def _open(self, label: Label) -> None:
        self.ranges += 1

    def _close(self) -> None:
        pass


@pytest.mark.usefixtures("full")
def test_ranges(bench: Bench, benchmark: Any, fast: Precision) -> None:
    name = f"mtbert full {fast}"

    def candidate(
        suffix: str, listener: Callable[[], RangeTree] | None, needs: tuple[str, ...] = ()
    ) -> Candidate:
        def build() -> Side:
            step = build_step(bench.workload, bench.device, precision=fast)
            side = own_side(f"{name}{suffix}", bench.workload, step)
            ranges = None if listener is None else listener()
            if ranges is None:
                # With the number of ranges an upper bound of their cost without a listener: those of modules and of the
                # backward pass do not exist then.
                side.figures["nanoseconds_a_range"] = 1e9 * cost_when_off()

            def run(repeat: int) -> float:
                with ExitStack() as stack:
                    if ranges is not None:
                        stack.enter_context(listening(ranges))
                        stack.enter_context(ranges.modules(step.model))
                    before = ranges.ranges if isinstance(ranges, Unheard) else 0
                    tokens = side.run(repeat)
                if isinstance(ranges, Unheard):
                    side.figures["ranges_a_step"] = ranges.ranges - before
                return tokens

            return Side(side.name, run, side.figures)

        return Candidate(f"{name}{suffix}", build, DTYPES[fast], needs=needs)

    bench.compare(
        "ranges",
        [
            candidate("", None),
            candidate(", listened to", Unheard),
            candidate(", with nvtx", NvtxRanges, ("nvtx",)),
        ],
        benchmark,
        baseline=name,
        goals=[Goal(f"{name}, listened to", name, 0.97), Goal(f"{name}, with nvtx", name, 0.97)],
    )


def cost_when_off() -> float:
    """Seconds of this thread that a span and an operation add, on average, to what they stand around, where nobody
    listens.
    """

    def plain(x: int) -> int:
        return x

    ranged = operation("plain")(plain)

    def bare() -> None:
        for x in range(_CALLS):
            plain(x)

    def named() -> None:
        for x in range(_CALLS):
            with span("loss", "sst"):
                ranged(x)

    return max(0.0, min(_seconds(named) for _ in range(5)) - min(_seconds(bare) for _ in range(5))) / (
        2 * _CALLS
    )


def _seconds(call: Callable[[], None]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin

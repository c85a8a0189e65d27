"""What a last layer at first tokens alone spares, where every head, or all but one, reads nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.memory import activation_bytes
from bench.own import build_step, own_side
from bench.test_train_step import DTYPES, QUERY_VALUE, fast
from mtbert.config import Mode
from mtbert.engine.precision import Precision
from mtbert.model.multitask import MultiTaskModel

__all__ = ["fast"]

ALONE, WHOLE = "first tokens alone", "whole last layer"


@contextmanager
def last_layer(whole: bool) -> Iterator[None]:
    """Within, the last layer computes every token (whole), or of rows that are pooled by their first token no other."""
    decide = MultiTaskModel.first_token_streams
    if whole:
        MultiTaskModel.first_token_streams = lambda *_: set()  # type: ignore[method-assign]
    try:
        yield
    finally:
        MultiTaskModel.first_token_streams = decide  # type: ignore[method-assign]


@pytest.mark.parametrize("mean", [(), ("sts",)], ids=["all", "all but one"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.usefixtures("full")
def test_last_layer(bench: Bench, benchmark: Any, fast: Precision, mode: Mode, mean: tuple[str, ...]) -> None:
    lora = QUERY_VALUE if mode == "lora" else None

    def candidate(name: str) -> Candidate:
        def build() -> Side:
            step = build_step(bench.workload, bench.device, mode=mode, precision=fast, lora=lora, mean=mean)
            side = own_side(name, bench.workload, step)
            with last_layer(name == WHOLE):
                tokens, held = activation_bytes(step, bench.workload.steps[0], bench.device)

            def run(repeat: int) -> float:
                with last_layer(name == WHOLE):
                    return side.run(repeat)

            return Side(name, run, {"activation_kibibytes_per_token": held / 2**10 / tokens})

        return Candidate(name, build, DTYPES[fast], "full" if mode == "full" else "lora", lora)

    bench.compare(
        f"first tokens alone, {mode}{', all tasks but sts' if mean else ''}",
        [candidate(WHOLE), candidate(ALONE)],
        benchmark,
        baseline=WHOLE,
        goals=[Goal(ALONE, WHOLE)],
    )

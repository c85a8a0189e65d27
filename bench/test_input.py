"""What it brings to make the input of the next steps ready on a thread, and how long steps wait for it without one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, curriculum_of
from bench.test_train_step import DTYPES, fast
from bench.workload import Workload
from mtbert.engine.input_pipeline import InputPipeline
from mtbert.engine.precision import Precision
from mtbert.engine.step import TrainStep
from mtbert.engine.step_result import StepResult

__all__ = ["fast"]


@pytest.mark.usefixtures("full")
def test_input(bench: Bench, benchmark: Any, fast: Precision) -> None:
    def candidate(name: str, ahead: int) -> Candidate:
        def build() -> Side:
            step = build_step(bench.workload, bench.device, precision=fast)
            return loop_side(name, bench.workload, step, ahead)

        return Candidate(name, build, DTYPES[fast])

    sides = [candidate(f"{ahead} steps ahead", ahead) for ahead in (0, 1, 2)]
    bench.compare("input", sides, benchmark, baseline=sides[0].name)


def loop_side(name: str, workload: Workload, step: TrainStep, ahead: int) -> Side:
    """The whole pool a repeat, as the trainer's loop takes it; nothing is ready when a repeat begins."""
    figures: dict[str, float] = {}

    def run(repeat: int) -> float:
        curriculum = curriculum_of(workload)
        tokens, waited, begin = 0, 0.0, time.perf_counter()
        before: StepResult | None = None
        with InputPipeline(curriculum, step.prepare, ahead=ahead, evaluates=lambda _: False) as inputs:
            for _ in range(curriculum.total_steps):
                asked = time.perf_counter()
                ready = inputs.next()
                waited += time.perf_counter() - asked
                result = step.run(ready)
                if before is not None:
                    before.check()
                before = result
                tokens += result.tokens
        figures["input_wait_share"] = waited / (time.perf_counter() - begin)
        return tokens

    return Side(name, run, figures)

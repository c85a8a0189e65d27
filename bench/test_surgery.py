"""What gradient surgery costs: PCGrad from one backward pass beside a summed step and a backward pass a task."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, own_side
from bench.test_train_step import DTYPES, QUERY_VALUE, fast
from mtbert.config import Mode
from mtbert.engine.flops import Pass
from mtbert.engine.gradients import OnePassGradients
from mtbert.engine.precision import Precision
from mtbert.optim.surgery import SurgeryConfig

__all__ = ["fast"]

SIDES = {
    "summed": SurgeryConfig(),
    "pcgrad, one pass": SurgeryConfig(method="pcgrad"),
    "pcgrad, a pass a task": SurgeryConfig(method="pcgrad", gradients="per-task"),
}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_surgery(
    bench: Bench, benchmark: Any, fast: Precision, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a step may take at most, in steps that sum.
    at_most = {"full": (1.25, None), "lora": (1.25, 1.05)}[mode]
    aims = [None if most is None else round(1 / most, 3) for most in at_most]
    lora = QUERY_VALUE if mode == "lora" else None
    held = {"bytes": 0}
    whole = OnePassGradients._task_gradients

    def counted(self: OnePassGradients, summed: Any) -> Any:
        found = whole(self, summed)
        held["bytes"] = sum(gradient.numel() * gradient.element_size() for _, gradient in found)
        return found

    monkeypatch.setattr(OnePassGradients, "_task_gradients", counted)

    def candidate(name: str, surgery: SurgeryConfig) -> Candidate:
        def build() -> Side:
            step = build_step(
                bench.workload, bench.device, mode=mode, precision=fast, lora=lora, surgery=surgery
            )
            side = own_side(name, bench.workload, step)
            if name != "pcgrad, one pass":
                return side

            def run(repeat: int) -> float:
                tokens = side.run(repeat)
                side.figures["task_gradient_mebibytes"] = held["bytes"] / 2**20
                return tokens

            return dataclasses.replace(side, run=run)

        counted: Pass = "full" if mode == "full" else "lora"
        heavy = name == "pcgrad, a pass a task" and bench.device.type == "cpu"
        return Candidate(name, build, DTYPES[fast], counted, lora, heavy=heavy)

    bench.compare(
        f"gradient surgery, {mode}",
        [candidate(name, surgery) for name, surgery in SIDES.items()],
        benchmark,
        baseline="summed",
        goals=[
            Goal("pcgrad, one pass", "summed", bench.aim(two_cores=aims[0], one_gpu=aims[1])),
            Goal("pcgrad, one pass", "pcgrad, a pass a task"),
        ],
    )

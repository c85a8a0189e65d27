"""Captured training steps beside the same steps without a graph: equal to the bit, and how much faster.

    python -m bench.graphs_check                       on a GPU
    python -m bench.graphs_check --device cpu          tries the program itself: nothing is captured, nothing is faster

Three models start alike and take the same steps: `captured`; `padded`, its twin, one operation after the other; and
`plain`, which packs without filler. Losses, gradient norms, weights and moments of the first two must be equal. Then
the three are timed in turn, with the input made ready beforehand. Exit code 1: they differ, or nothing was captured.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.measure import Alternation, Side
from bench.own import build_step, curriculum_of
from bench.workload import Workload, build_workload
from mtbert.config import Mode
from mtbert.engine.capture import CudaRecorder, Recorded, Recorder
from mtbert.engine.graphs import enable
from mtbert.engine.peaks import synchronise
from mtbert.engine.precision import Precision
from mtbert.engine.step import TrainStep
from mtbert.optim.schedule import set_learning_rate
from mtbert.optim.surgery import SurgeryConfig

CASES: dict[str, tuple[Mode, Precision, SurgeryConfig]] = {
    "full, bf16": ("full", "bf16", SurgeryConfig()),
    "full, bf16, pcgrad": ("full", "bf16", SurgeryConfig(method="pcgrad")),
    "lora, bf16": ("lora", "bf16", SurgeryConfig()),
    "full, float32, gradvac": ("full", "float32", SurgeryConfig(method="gradvac")),
}


class Repeats:
    """Stands for a graph where there is none: a replay does the work again."""

    def run(self, work: Callable[[], Any]) -> Any:
        """Do it."""
        return work()

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Do it, and again at every replay."""
        result = work()
        return Recorded(result, lambda: result.copy_(work()), done=True)


def recorder_of(device: torch.device) -> Recorder:
    """CUDA graphs on a GPU."""
    return CudaRecorder(device) if device.type == "cuda" else Repeats()


def check(name: str, workload: Workload, device: torch.device, steps: int, rounds: int) -> bool:
    """Compare and time one case; returns whether all was as it should be."""
    mode, precision, surgery = CASES[name]
    sides: dict[str, TrainStep] = {}
    for side in ("captured", "padded", "plain"):
        sides[side] = build_step(workload, device, mode=mode, precision=precision, surgery=surgery)
        if side != "plain":
            enable(sides[side], curriculum_of(workload), recorder_of(device))
    graphs, sides["padded"].graphs = sides["captured"].graphs, None
    assert graphs is not None
    differences = compare(sides["captured"], sides["padded"], workload, steps)
    for difference in differences[:10]:
        print(f"{name}: {difference}")
    replayed = graphs.counts["replayed"]
    print(f"{name}: {len(differences)} differences in {steps} steps; steps: {graphs.summary()}")
    alternation = Alternation(
        [timed(side, step, workload, steps) for side, step in sides.items()],
        synchronise=lambda: synchronise(device),
    )
    alternation.warm_up()
    for _ in range(rounds):
        alternation.round()
    for side in sides:
        rate, ratio = alternation.rate(side), alternation.ratio(side, "plain")
        print(f"{name}: {side:9} {rate.median:12,.0f} useful tokens/s, {ratio.median:.3f} x plain")
    return not differences and replayed > 0


def compare(captured: TrainStep, padded: TrainStep, workload: Workload, steps: int) -> list[str]:
    """What differs between the two: figures of each step, then weights and moments."""
    found = []
    for step in range(steps):
        results = []
        for side in (captured, padded):
            set_learning_rate(side.optimizer, 1.0 - step / steps)
            results.append(side(workload.steps[step % len(workload.steps)], step))
        mine, twin = results
        figures = {"total": (mine.total, twin.total), "norm": (mine.grad_norm, twin.grad_norm)}
        figures |= {task: (loss, twin.losses[task]) for task, loss in mine.losses.items()}
        for name, (a, b) in figures.items():
            if float(a) != float(b):
                found.append(f"step {step}, {name}: {float(a)} captured, {float(b)} without")
    tensors = zip(_state(captured), _state(padded), strict=True)
    for (name, a), (_, b) in tensors:
        if not torch.equal(a, b):
            found.append(f"{name}: up to {float((a - b).abs().max()):.3g} apart after {steps} steps")
    return found


def _state(step: TrainStep) -> list[tuple[str, torch.Tensor]]:
    named = list(step.model.named_parameters())
    moments = [
        (f"{name}/{entry}", value)
        for name, parameter in named
        for entry, value in step.optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    ]
    return [(name, parameter.detach()) for name, parameter in named] + moments


def timed(name: str, step: TrainStep, workload: Workload, steps: int) -> Side:
    """The whole pool a repeat; the input is ready."""
    ready = [step.prepare(plan, steps + number) for number, plan in enumerate(workload.steps)]

    def run(repeat: int) -> float:
        results = [step.run(each) for each in ready]
        return sum(result.tokens for result in results)

    return Side(name, run)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.graphs_check", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="useful tokens a step")
    parser.add_argument("--pool", type=int, default=5, help="different steps")
    parser.add_argument("--steps", type=int, default=15, help="steps that are compared")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are timed")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
    workload = build_workload("minilm", tokens_per_step=options.tokens, steps=options.pool)
    begin, good = time.monotonic(), True
    for name in options.cases:
        good &= check(name, workload, device, options.steps, options.rounds)
    print(f"{'as it should be' if good else 'NOT as it should be'}, {time.monotonic() - begin:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""Gradient checkpointing: what a step costs in time and in memory for activations, mode by mode."""

from __future__ import annotations

from typing import Any

import pytest

from bench import records
from bench.comparison import Goal
from bench.harness import RECORDED_REPEATS, Bench, Candidate
from bench.measure import Side
from bench.memory import activation_bytes
from bench.memory_page import COMPARISON, write_page
from bench.own import build_step, own_side
from bench.test_train_step import DTYPES, QUERY_VALUE, fast
from bench.workload import build_workload
from mtbert.config import Mode
from mtbert.engine.precision import Precision
from mtbert.model.checkpointing import CheckpointingConfig

__all__ = ["fast"]

SIDES = {
    "nothing again": CheckpointingConfig(),
    "selective": CheckpointingConfig("selective"),
    "every other layer": CheckpointingConfig("layers", 2),
    "layers": CheckpointingConfig("layers"),
}


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.usefixtures("full")
def test_checkpointing(bench: Bench, benchmark: Any, fast: Precision, mode: Mode) -> None:
    lora = QUERY_VALUE if mode == "lora" else None

    def candidate(name: str, checkpointing: CheckpointingConfig) -> Candidate:
        def build() -> Side:
            step = build_step(bench.workload, bench.device, mode=mode, precision=fast, lora=lora)
            step.model.encoder.set_checkpointing(checkpointing)
            side = own_side(name, bench.workload, step)
            tokens, held = activation_bytes(step, bench.workload.steps[0], bench.device)
            side.figures["activation_kibibytes_per_token"] = held / 2**10 / tokens
            return side

        return Candidate(name, build, DTYPES[fast], "full" if mode == "full" else "lora", lora)

    bench.compare(
        f"gradient checkpointing, {mode}",
        [candidate(name, checkpointing) for name, checkpointing in SIDES.items()],
        benchmark,
        baseline="nothing again",
        goals=[Goal("layers", "nothing again"), Goal("selective", "nothing again")],
    )


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.usefixtures("full")
def test_activation_memory(bench: Bench, fast: Precision, mode: Mode) -> None:
    """Against the tokens of a step: half of the session's to four times as many."""
    lora = QUERY_VALUE if mode == "lora" else None
    usual = bench.workload.tokens // len(bench.workload.steps)
    points: dict[str, list[tuple[int, int]]] = {name: [] for name in SIDES}
    for wanted in (usual // 2, usual, 2 * usual, 4 * usual):
        workload = build_workload(bench.workload.encoder_name, tokens_per_step=wanted, steps=1)
        step = build_step(workload, bench.device, mode=mode, precision=fast, lora=lora)
        for name, checkpointing in SIDES.items():
            step.model.encoder.set_checkpointing(checkpointing)
            points[name].append(activation_bytes(step, workload.steps[0], bench.device))
    for name, found in points.items():
        print(f"{mode}, {name}:", ", ".join(f"{n:,} tokens {held / 2**20:.0f} MiB" for n, held in found))
    # The most is spared where everything is computed again, and nothing where nothing is.
    assert points["layers"][-1][1] < points["selective"][-1][1] < points["nothing again"][-1][1]
    if bench.results is not None and bench.repeats >= RECORDED_REPEATS:
        facts = bench.facts(DTYPES[fast])
        record = {"dtype": fast, "points": points}
        write_page(records.write(bench.results, facts.pop("device"), f"{COMPARISON}, {mode}", record, facts))

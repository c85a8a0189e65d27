"""A whole training step of mtbert beside plain `transformers` and `peft` loops, on the same sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, frozen_side, own_side
from bench.peers import PlainLoop, loop_side
from mtbert.config import Mode
from mtbert.engine.precision import Precision, has_fast_bf16
from mtbert.model.lora import PROJECTIONS, LoraConfig

DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}
QUERY_VALUE = LoraConfig()
EVERYWHERE = LoraConfig(projections=list(PROJECTIONS))  # type: ignore[arg-type]


def own(
    bench: Bench, name: str, precision: Precision, mode: Mode = "full", lora: LoraConfig | None = None
) -> Candidate:
    def build() -> Side:
        step = build_step(bench.workload, bench.device, mode=mode, precision=precision, lora=lora)
        side = frozen_side if mode == "last-linear-layer" else own_side
        return side(name, bench.workload, step)

    counted = {"full": "full", "lora": "lora"}.get(mode)
    return Candidate(name, build, DTYPES[precision], counted, lora)  # type: ignore[arg-type]


def peer(
    bench: Bench,
    name: str,
    precision: Precision,
    *,
    bucketed: bool,
    step_every_batch: bool = False,
    lora: LoraConfig | None = None,
) -> Candidate:
    def build() -> Side:
        loop = PlainLoop(
            bench.workload,
            bench.device,
            dtype=DTYPES[precision],
            bucketed=bucketed,
            step_every_batch=step_every_batch,
            lora=lora,
        )
        return loop_side(name, loop)

    needs = ("transformers",) if lora is None else ("transformers", "peft")
    return Candidate(name, build, DTYPES[precision], "full" if lora is None else "lora", lora, needs)


@pytest.fixture
def fast(bench: Bench) -> Precision:
    """What the machine multiplies fastest."""
    return "bf16" if has_fast_bf16(bench.device) else "float32"


def test_full_fine_tuning(bench: Bench, benchmark: Any, fast: Precision) -> None:
    mtbert, bucketed = f"mtbert full {fast}", f"transformers bucketed {fast}"
    bench.compare(
        "full fine-tuning",
        [
            own(bench, mtbert, fast),
            peer(bench, bucketed, fast, bucketed=True),
            peer(bench, f"{bucketed}, a step a batch", fast, bucketed=True, step_every_batch=True),
            peer(bench, f"transformers stock {fast}", fast, bucketed=False),
        ],
        benchmark,
        baseline=mtbert,
        goals=[Goal(mtbert, bucketed, 1.3)],
    )


def test_precision(bench: Bench, benchmark: Any, fast: Precision) -> None:
    if fast == "float32":
        pytest.skip("this machine has no fast bf16: the other comparisons ran in float32")
    bench.compare(
        "float32",
        [
            own(bench, "mtbert full bf16", "bf16"),
            own(bench, "mtbert full float32", "float32"),
            peer(bench, "transformers stock float32", "float32", bucketed=False),
        ],
        benchmark,
        baseline="mtbert full bf16",
        goals=[Goal("mtbert full bf16", "transformers stock float32")],
    )


def test_lora_and_frozen(bench: Bench, benchmark: Any, fast: Precision) -> None:
    full, lora = f"mtbert full {fast}", f"mtbert lora query,value {fast}"
    bench.compare(
        "lora",
        [
            own(bench, full, fast),
            own(bench, lora, fast, "lora", QUERY_VALUE),
            own(bench, f"mtbert lora all six {fast}", fast, "lora", EVERYWHERE),
            own(bench, f"mtbert last-linear-layer {fast}", fast, "last-linear-layer"),
            peer(bench, f"peft lora query,value {fast}", fast, bucketed=True, lora=QUERY_VALUE),
        ],
        benchmark,
        baseline=full,
        goals=[Goal(lora, full, 1.0), Goal(lora, f"peft lora query,value {fast}")],
    )

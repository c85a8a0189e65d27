"""Steps that begin above frozen layers, beside the same steps that compute all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.comparison import Goal
from bench.harness import Bench, Candidate
from bench.measure import Side
from bench.own import build_step, own_side, prefix_side
from mtbert.config import Mode
from mtbert.engine.precision import Precision, has_fast_bf16
from mtbert.model.lora import LoraConfig
from mtbert.model.pretrained import load_config

TRAINED = 2
"""Layers from the top."""


@pytest.mark.usefixtures("full")
def test_frozen_prefix(bench: Bench, benchmark: Any, tmp_path: Path) -> None:
    """Full fine-tuning of the last two layers, and adapters in them alone; the layers below are frozen."""
    precision: Precision = "bf16" if has_fast_bf16(bench.device) else "float32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layers = load_config(bench.workload.encoder).num_hidden_layers
    if layers <= TRAINED:
        pytest.skip(f"{bench.workload.encoder_name} has {layers} layers: none is left to freeze")
    adapters = LoraConfig(layers=list(range(layers - TRAINED, layers)))
    settings: dict[str, tuple[Mode, dict[str, Any]]] = {
        f"full, last {TRAINED} of {layers}": ("full", {"trained_layers": TRAINED}),
        f"lora, last {TRAINED} of {layers}": ("lora", {"lora": adapters}),
    }

    def own(name: str, mode: Mode, values: dict[str, Any], frozen: Path | None) -> Candidate:
        def build() -> Side:
            step = build_step(
                bench.workload, bench.device, mode=mode, precision=precision, frozen=frozen, **values
            )
            return (own_side if frozen is None else prefix_side)(name, bench.workload, step)

        return Candidate(name, build, dtype, None)

    sides, goals = [own(f"full, all {layers}", "full", {}, None)], []
    for name, (mode, values) in settings.items():
        sides.append(own(name, mode, values, None))
        sides.append(own(f"{name}, from files", mode, values, tmp_path / mode))
        goals.append(Goal(f"{name}, from files", name, 1.5))
    bench.compare("frozen prefix", sides, benchmark, baseline=f"full, all {layers}", goals=goals)

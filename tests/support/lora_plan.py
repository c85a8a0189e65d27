"""The extension's choice of a kernel for a LoRA product, by the host compiler."""

from __future__ import annotations

import torch
from support.emulation import load

AUTO, SM80, SM80_SPLIT, SM90, SM90_SPLIT = range(5)


def plan(
    architecture: int, rows: int, outputs: int, rank: int, dropout: bool, sm90: bool = True
) -> tuple[int, int]:
    """The forward kernel and that of the input's gradient."""
    results = torch.zeros(2, dtype=torch.int64)
    threshold = 6554 if dropout else 0
    load("lora_plan.cpp").call(
        "lora_plan_of", architecture, int(sm90), rows, outputs, rank, threshold, results
    )
    forward, of_input = results.tolist()
    return forward, of_input

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


def takes_wide(shapes: list[tuple[int, int, int, int, bool]]) -> list[bool]:
    """Whether products of 16-bit elements are cut into tiles of 128 x 256, else 64 x 128, by the mma.sync kernels.

    shapes: rows, columns of a block, blocks, the rank where s is made (else 0), whether with dropout.
    """
    results = torch.zeros(len(shapes), dtype=torch.int64)
    flat = torch.tensor([[int(value) for value in shape] for shape in shapes], dtype=torch.int64)
    load("lora_plan.cpp").call("lora_wide", flat, len(shapes), results)
    return [bool(result) for result in results]


def cuts(shapes: list[tuple[int, int, int]], multiprocessors: int) -> list[tuple[int, int, int, int, int]]:
    """How the wgmma kernels cut products: width of the tiles, tiles, those that make s, the most of both in a block.

    shapes: rows, columns of a block, blocks.
    """
    results = torch.zeros(len(shapes), 5, dtype=torch.int64)
    load("lora_plan.cpp").call(
        "lora_cuts", torch.tensor(shapes, dtype=torch.int64), len(shapes), multiprocessors, results
    )
    return [tuple(row) for row in results.tolist()]

"""A LoRA linear, and queries, keys and values, beside the bare frozen product, PyTorch's operations and PEFT.

On a CPU small, to run the harness.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.kernels.session import Kernels
from bench.lora.comparisons import COMPILED, Plan, compare
from bench.lora.qkv_comparisons import BUILDERS, QkvPlan
from mtbert.engine.precision import resolve_device

TOKENS = {"cuda": 8192, "cpu": 64}
SIZES = {
    "cuda": ((768, 768), (768, 3072), (3072, 768), (1024, 1024), (384, 384)),
    "cpu": ((64, 96),),
}
"""Inputs and outputs."""
RANKS = {"cuda": (8, 32, 64), "cpu": (4,)}
"""Beside rank 16."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The sizes, ranks and widths of the device."""
    device = resolve_device(metafunc.config.getoption("--device")).type
    for name, values in (("size", SIZES[device]), ("rank", RANKS[device]), ("width", WIDTHS[device])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values, ids=str)


def run(kernels: Kernels, benchmark: Any, size: tuple[int, int], rank: int, p: float, backward: bool) -> None:
    device = kernels.device
    plan = Plan(TOKENS[device.type], *size, rank, p, device, kernels.dtype, backward)
    # It takes longest to build, and is compared at one rank.
    without = () if rank == 16 and device.type == "cuda" else (COMPILED,)
    kernels.run(
        plan.name, lambda measure: compare(plan, kernels.stopwatch, measure, without=without), benchmark
    )


WIDTHS = {"cuda": (768, 1024, 384), "cpu": (64,)}
"""Of queries, keys and values, and of x."""


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_queries_keys_and_values(kernels: Kernels, benchmark: Any, width: int, backward: bool) -> None:
    device = kernels.device
    plan = QkvPlan(TOKENS[device.type], width, width, 16, 0.1, device, kernels.dtype, backward)
    kernels.run(
        plan.name, lambda measure: compare(plan, kernels.stopwatch, measure, builders=BUILDERS), benchmark
    )


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_forward(kernels: Kernels, benchmark: Any, size: tuple[int, int], p: float) -> None:
    run(kernels, benchmark, size, 16, p, backward=False)


def test_both(kernels: Kernels, benchmark: Any, size: tuple[int, int]) -> None:
    run(kernels, benchmark, size, 16, 0.1, backward=True)


def test_other_ranks(kernels: Kernels, benchmark: Any, size: tuple[int, int], rank: int) -> None:
    run(kernels, benchmark, size, rank, 0.1, backward=True)


def test_forward_of_other_ranks(kernels: Kernels, benchmark: Any, size: tuple[int, int], rank: int) -> None:
    run(kernels, benchmark, size, rank, 0.0, backward=False)

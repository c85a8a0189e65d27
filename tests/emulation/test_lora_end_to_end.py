"""The public LoRA operations by the sm_80 kernels' own source, on the emulated machine: forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate
from support.lora_emulated import EmulatedExtension
from torch import Tensor

from mtbert.kernels import Segments, dispatch, extension, lora_linear, lora_qkv, reference
from mtbert.kernels.segments import companion

BOUNDS = (0, 0, 13, 37)


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return drawn.to(torch.bfloat16)


def run(
    operation: Any, inputs: int, outputs: int, ranks: tuple[int | None, ...], dtype: torch.dtype
) -> list[Tensor]:
    """The output and the gradients of x and of each group's adapters; everything in `dtype`, parameters wide."""
    rows, total = BOUNDS[-1], outputs * len(ranks)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = random(rows, inputs, seed=0).to(dtype).requires_grad_()
    weight, bias = random(total, inputs, seed=1, scale=0.2).to(dtype), random(total, seed=2).to(dtype)
    pairs = [
        None
        if rank is None
        else (
            random(rank, inputs, seed=3 + i, scale=0.2).to(wide),
            random(outputs, rank, seed=9 + i).to(wide),
        )
        for i, rank in enumerate(ranks)
    ]
    parameters = [p for pair in pairs if pair is not None for p in pair]
    takers = {p: companion(p, len(BOUNDS) - 1) for p in parameters}
    options: dict[str, Any] = {"scale": 0.5, "dropout": DROPOUT, "segments": Segments(BOUNDS, takers)}
    options["dropout_row"] = torch.arange(rows, dtype=torch.int32) * 4096 + 5
    if len(ranks) == 1:
        output = operation(x, weight, bias, *parameters, **options)
    else:
        output = operation(x, weight, bias, tuple(pairs), **options)
    gradients = torch.autograd.grad(
        output, [x, *takers.values()], random(rows, total, seed=20).to(output.dtype)
    )
    return [output.detach(), gradients[0], *(part for g in gradients[1:] for part in g.unbind())]


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "ranks"),
    [("lora_linear", 104, 136, (5,)), ("lora_qkv", 40, 24, (8, None, 3))],
    ids=["lora_linear", "lora_qkv"],
)
def test_forward_and_backward(name: str, inputs: int, outputs: int, ranks: tuple[int | None, ...]) -> None:
    operation = {"lora_linear": lora_linear, "lora_qkv": lora_qkv}[name]
    twin = getattr(reference, name)
    machine = EmulatedExtension()
    with extension.cuda_stand_in(machine), dispatch.use_backend("cuda"):
        found = run(operation, inputs, outputs, ranks, torch.bfloat16)
    assert machine.calls == ["lora_forward", "lora_low", "lora_input", "lora_grad_a"]
    plain = run(twin, inputs, outputs, ranks, torch.bfloat16)
    exact = run(twin, inputs, outputs, ranks, torch.float64)
    assert_accurate(found, plain, exact, torch.bfloat16)

"""Tensors of more than 2**31 elements: the last rows come out as they do alone. On a GPU with memory enough."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtbert import kernels
from mtbert.kernels.dropout import Dropout

WIDTH = 1024
ROWS = 2**31 // WIDTH + 5
LAST = 3
MASK = Dropout(0.1, 5, 3, 7)
NEEDED = 60 << 30
"""Bytes: about a dozen bfloat16 tensors of that size."""

Run = Callable[[Tensor, Tensor], Tensor]


def operations(device: torch.device) -> dict[str, Run]:
    """Functions of x [T, WIDTH] and the rows of its mask."""
    draws = torch.Generator(device).manual_seed(0)
    weight, bias = (torch.randn(WIDTH, device=device, generator=draws) for _ in range(2))
    words, positions, types = (
        torch.randn(rows, WIDTH, device=device, generator=draws) for rows in (50, 512, 2)
    )

    def embedding(x: Tensor, rows: Tensor) -> Tensor:
        ids = rows % 50
        found = kernels.embedding(
            ids,
            ids % 2,
            rows % 512,
            (words, positions, types),
            weight,
            bias,
            eps=1e-12,
            dtype=x.dtype,
            dropout_row=rows,
            dropout=MASK,
        )
        return found.add_(x)

    return {
        "add_layer_norm": lambda x, rows: kernels.add_layer_norm(
            x, x, weight, bias, linear_bias=bias, eps=1e-12, dropout_row=rows, dropout=MASK
        ),
        "bias_gelu": lambda x, rows: kernels.bias_gelu(x, bias),
        "dropout": lambda x, rows: kernels.dropout(x, rows, MASK),
        "embedding": embedding,
        "softmax": lambda x, rows: kernels.softmax(x, dropout_row=rows, dropout=MASK),
    }


@pytest.mark.parametrize("name", ["add_layer_norm", "bias_gelu", "dropout", "embedding", "softmax"])
def test_the_last_rows_are_as_they_are_alone(device: torch.device, name: str) -> None:
    if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < NEEDED:
        pytest.skip(f"needs a GPU with {NEEDED >> 30} GiB of free memory")
    function = operations(device)[name]
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device=device).normal_()
    rows = torch.arange(ROWS, dtype=torch.int32, device=device)
    upstream = torch.empty_like(x).normal_()

    def both(first: int) -> list[Tensor]:
        part = x[first:].detach().requires_grad_()
        out = function(part, rows[first:])
        (gradient,) = torch.autograd.grad(out, part, upstream[first:])
        return [out[-LAST:].detach().clone(), gradient[-LAST:].clone()]

    alone = both(ROWS - LAST)
    for found, expected in zip(both(0), alone, strict=True):
        assert torch.isfinite(expected).all()
        torch.testing.assert_close(found, expected)

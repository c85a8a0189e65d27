"""torch.compile: one graph for each operation, forward and backward, and none more as the number of tokens changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mtbert import kernels
from mtbert.kernels.dropout import Dropout

WIDTH = 32
# dynamo takes the first size as a constant, and any size from the second on.
MOST_GRAPHS = 2


def parameter(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).requires_grad_()


def operations(device: torch.device) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Functions of x [T, WIDTH] and the mask's rows [T]."""
    mask = Dropout(0.1, 5, 3, 7)
    weight, bias, linear_bias = (parameter(device, WIDTH) for _ in range(3))
    square = parameter(device, WIDTH, WIDTH)
    tables = [parameter(device, rows, WIDTH) for rows in (40, 64, 2)]

    def embedding(x: Tensor, rows: Tensor) -> Tensor:
        ids = (rows % 40).int()
        return x + kernels.embedding(
            ids,
            ids % 2,
            rows,
            tuple(tables),
            weight,
            bias,
            eps=1e-12,
            dtype=x.dtype,
            dropout_row=rows,
            dropout=mask,
        )

    def add_layer_norm(x: Tensor, rows: Tensor) -> Tensor:
        return kernels.add_layer_norm(
            x, x, weight, bias, linear_bias=linear_bias, eps=1e-12, dropout_row=rows, dropout=mask
        )

    def attention(x: Tensor, rows: Tensor) -> Tensor:
        tokens = x.shape[0]
        qkv = x.repeat(1, 3).view(tokens, 3, 2, WIDTH // 2)
        ends = torch.stack([rows[0], rows[-1] + 1])
        return kernels.attention(qkv, ends, 32, scale=0.25, dropout_row=rows, dropout=mask).flatten(1)

    return {
        "add_layer_norm": add_layer_norm,
        "attention": attention,
        "bias_gelu": lambda x, rows: kernels.bias_gelu(x, bias),
        "dropout": lambda x, rows: kernels.dropout(x, rows, mask),
        "embedding": embedding,
        "linear": lambda x, rows: kernels.linear(x, square, bias),
        "lora_linear": lambda x, rows: kernels.lora_linear(
            x,
            square.detach(),
            bias,
            tables[2],
            tables[2].t().contiguous(),
            scale=2.0,
            dropout_row=rows,
            dropout=mask,
        ),
        "softmax": lambda x, rows: kernels.softmax(x, dropout_row=rows, dropout=mask),
    }


@pytest.mark.parametrize("name", sorted(operations(torch.device("cpu"))))
def test_more_tokens_compile_nothing_more(device: torch.device, name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = operations(device)[name]
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for tokens in (3, 4, 5, 7):
        rows = torch.arange(tokens, dtype=torch.int32, device=device)
        x = torch.randn(tokens, WIDTH, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(compiled(x, rows).square().sum(), x)
        (expected,) = torch.autograd.grad(function(x, rows).square().sum(), x)
        torch.testing.assert_close(gradient, expected)
    assert counter.frame_count <= MOST_GRAPHS

"""The linear map of each attention head, and its gradients group by group."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mtbert.kernels import Segments, dispatch, head_linear
from mtbert.kernels.segments import companion

TOKENS, HEADS, SIZE, OUT = 11, 3, 4, 5
BOUNDS = (0, 4, 4, 11)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def by_hand(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = []
    for t in range(x.shape[0]):
        heads = [weight[h] @ x[t, h] for h in range(x.shape[1])]
        rows.append(torch.stack(heads) + (0 if bias is None else bias.view(len(heads), -1)))
    return torch.stack(rows)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        drawn(TOKENS, HEADS, SIZE, seed=1, dtype=dtype),
        drawn(HEADS, OUT, SIZE, seed=2, dtype=dtype),
        drawn(HEADS * OUT, seed=3, dtype=dtype),
    ]


@pytest.fixture(params=["auto", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("with_bias", [True, False])
def test_every_head_has_its_own_map(backend: str, with_bias: bool):
    inputs = leaves() if with_bias else leaves()[:2]
    arguments = [*inputs, None][:3]
    found, expected = head_linear(*arguments), by_hand(*arguments)
    assert found.is_contiguous()
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_gradients_by_group(backend: str):
    x, weight, bias = leaves()
    companions = {weight: companion(weight, 3), bias: companion(bias, 3)}
    found = head_linear(x, weight, bias, segments=Segments(BOUNDS, companions))
    upstream = torch.randn(found.shape, dtype=torch.float64)
    found.backward(upstream)
    assert weight.grad is None
    assert bias.grad is None
    for group, (low, high) in enumerate(pairwise(BOUNDS)):
        part = upstream.clone()
        part[:low], part[high:] = 0, 0
        for parameter in (weight, bias):
            (expected,) = torch.autograd.grad(by_hand(x, weight, bias), parameter, part)
            assert torch.allclose(companions[parameter].grad[group], expected, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.grad(by_hand(x, weight, bias), x, upstream)
    assert torch.allclose(x.grad, expected, rtol=0, atol=1e-12)


def test_a_frozen_weight_gets_none_and_a_single_companion_is_enough():
    x, weight, bias = leaves()
    weight.requires_grad_(False)
    segments = Segments(BOUNDS, {bias: companion(bias, 3)})
    head_linear(x, weight, bias, segments=segments).sum().backward()
    assert weight.grad is None
    assert bias.grad is None
    assert segments.companions[bias].grad[:, 0].tolist() == [4, 0, 7]
    assert x.grad is not None


def test_bfloat16_activations_over_float32_parameters(backend: str):
    x, weight, bias = leaves(torch.float32)
    found = head_linear(x.bfloat16(), weight, bias)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (found.float() - by_hand(x, weight, bias)).abs().max().item() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[:, :2].contiguous(), w, b), "weight must be of shape"),
        (lambda x, w, b: (x, w, b[:3]), "bias must be of shape"),
        (lambda x, w, b: (x.transpose(0, 1), w, b), "x must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit(change, message: str):
    with pytest.raises(ValueError, match=message):
        head_linear(*change(*leaves()))

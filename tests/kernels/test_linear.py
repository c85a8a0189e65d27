"""Products with and without adapters, against the reference twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, gradients
from torch import Tensor

from mtbert.kernels import Dropout, dispatch, linear, lora_linear, lora_qkv, reference

DTYPES = (torch.float32, torch.bfloat16)
ROWS = torch.arange(70, dtype=torch.int32) * 4096


def _random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _compare(
    fast: Callable[..., Tensor], twin: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype
) -> None:
    """arguments: x in dtype, then float32 parameters, all trained."""
    gradient = torch.randn_like(fast(*arguments))
    found = gradients(fast, arguments, gradient)
    plain = gradients(twin, arguments, gradient)
    exact = gradients(twin, [a.double() for a in arguments], gradient.double())
    assert_accurate(found, plain, exact, dtype)
    assert [f.dtype for f in found] == [dtype, dtype] + [torch.float32] * (len(arguments) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
def test_linear(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = _random(70, 48, seed=0, dtype=dtype), _random(40, 48, seed=1), _random(40, seed=2)
    with dispatch.use_backend(backend):
        _compare(linear, reference.linear, [x, weight, bias], dtype)
        _compare(
            lambda x, w: linear(x, w, None), lambda x, w: reference.linear(x, w, None), [x, weight], dtype
        )


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_linear(dtype: torch.dtype, rank: int, dropout: Dropout | None) -> None:
    arguments = [
        _random(70, 48, seed=0, dtype=dtype),
        *(_random(*shape, seed=i) for i, shape in enumerate([(40, 48), (40,), (rank, 48), (40, rank)])),
    ]
    options = {"scale": 0.7, "dropout_row": ROWS, "dropout": dropout}
    _compare(
        lambda x, w, b, la, lb: lora_linear(x, w, b, la, lb, **options),
        lambda x, w, b, la, lb: reference.lora_linear(x, w, b, la, lb, **options),
        arguments,
        dtype,
    )


@pytest.mark.parametrize(
    "which", [(True, True, True), (True, False, True), (False, False, True), (False,) * 3]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_qkv(dtype: torch.dtype, which: tuple[bool, ...]) -> None:
    # Ranks differ, so that a mix-up of the blocks shows.
    ranks = [2 + i for i in range(3) if which[i]]
    x, weight, bias = _random(70, 32, seed=0, dtype=dtype), _random(96, 32, seed=1), _random(96, seed=2)
    small = [_random(*s, seed=9 + r) for r in ranks for s in ((r, 32), (32, r))]

    def call(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, *flat: Tensor) -> Tensor:
            pairs = iter(zip(flat[::2], flat[1::2], strict=True))
            adapters = tuple(next(pairs) if use else None for use in which)
            return operation(x, weight, bias, adapters, scale=0.5, dropout_row=ROWS, dropout=DROPOUT)

        return run

    _compare(call(lora_qkv), call(reference.lora_qkv), [x, weight, bias, *small], dtype)


def test_float64_is_exact_to_rounding() -> None:
    x, weight, a, b = (
        _random(*shape, seed=i, dtype=torch.float64)
        for i, shape in enumerate([(70, 32), (96, 32), (4, 32), (96, 4)])
    )
    options = {"scale": 0.7, "dropout_row": ROWS, "dropout": DROPOUT}
    gradient = torch.randn(70, 96, dtype=torch.float64)
    found = gradients(
        lambda x, w, a, b: lora_linear(x, w, None, a, b, **options), [x, weight, a, b], gradient
    )
    exact = gradients(
        lambda x, w, a, b: reference.lora_linear(x, w, None, a, b, **options), [x, weight, a, b], gradient
    )
    for f, e in zip(found, exact, strict=True):
        assert torch.allclose(f, e, rtol=0, atol=1e-12)


def test_reference_gradients() -> None:
    x, weight, bias, a, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in [(5, 8), (6, 8), (6,), (2, 8), (6, 2)]
    )
    rows = ROWS[:5]
    assert torch.autograd.gradcheck(reference.linear, (x, weight, bias))
    assert torch.autograd.gradcheck(
        lambda *p: reference.lora_linear(*p, scale=0.5, dropout_row=rows, dropout=DROPOUT),
        (x, weight, bias, a, b),
    )


def test_frozen_weights_get_no_gradient_and_keep_no_activations() -> None:
    x, weight, bias = _random(70, 48, seed=0), _random(40, 48, seed=1), _random(40, seed=2)
    found = gradients(linear, [x, weight, bias], torch.ones(70, 40), frozen=(1, 2))
    assert found[2:] == [None, None]
    output = linear(x.requires_grad_(), weight, bias)
    kept = [t for t in output.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    assert all(t.data_ptr() != x.data_ptr() for t in kept)

    a, b = _random(4, 48, seed=3), _random(40, 4, seed=4)
    lora = gradients(
        lambda x, w, bias, a, b: lora_linear(x, w, bias, a, b, scale=1.0),
        [x, weight, bias, a, b],
        torch.ones(70, 40),
        frozen=(0, 1, 2),
    )
    assert lora[1:4] == [None, None, None]
    assert lora[4] is not None
    assert lora[5] is not None


def test_a_frozen_weight_in_the_activations_dtype_is_not_copied() -> None:
    x, weight = _random(70, 48, seed=0, dtype=torch.bfloat16), _random(40, 48, seed=1, dtype=torch.bfloat16)
    output = linear(x.requires_grad_(), weight, None)
    assert any(t is not None and t.data_ptr() == weight.data_ptr() for t in output.grad_fn.saved_tensors)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: linear(torch.zeros(3, 4), torch.zeros(5, 6), None),
            r"linear: weight must be of shape \[any, 4\]",
        ),
        (
            lambda: linear(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(4)),
            r"linear: bias must be of shape \[5\]",
        ),
        (lambda: linear(torch.zeros(4, 3).t(), torch.zeros(5, 4), None), "linear: x must be contiguous"),
        (
            lambda: lora_linear(
                torch.zeros(3, 4), torch.zeros(5, 4), None, torch.zeros(2, 4), torch.zeros(5, 3), scale=1.0
            ),
            r"lora_linear: lora b must be of shape \[5, 2\]",
        ),
        (
            lambda: lora_qkv(torch.zeros(3, 4), torch.zeros(5, 4), None, (None, None, None), scale=1.0),
            r"lora_qkv: weight must be of shape \[3C, K\]",
        ),
        (
            lambda: lora_qkv(torch.zeros(3, 4), torch.zeros(6, 4), None, (None,), scale=1.0),
            "lora_qkv: adapters must be three",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

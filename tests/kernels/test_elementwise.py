"""add_layer_norm, bias_gelu and embedding: accuracy, frozen parameters, determinism, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.kernels import Dropout, add_layer_norm, bias_gelu, embedding, reference

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """One operation on random inputs: the kernel, plain PyTorch step by step in the dtype, and float64."""

    kernel: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    arguments: list[Tensor]
    gradient: Tensor

    def check(self, dtype: torch.dtype) -> None:
        found = gradients(self.kernel, self.arguments, self.gradient)
        plain = gradients(self.plain, self.arguments, self.gradient)
        exact = gradients(self.plain, [a.double() for a in self.arguments], self.gradient.double())
        assert_accurate(found, plain, exact, dtype)


def _drop(x: Tensor, rows: Tensor, dropout: Dropout | None) -> Tensor:
    if dropout is None:
        return x
    kept = reference.dropout_mask(rows, torch.arange(x.shape[1]), dropout)
    return torch.where(kept, x * dropout.scale, 0.0)


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype), 1e-12)


def add_layer_norm_case(width: int, dtype: torch.dtype, dropout: Dropout | None, tokens: int = 150) -> Case:
    torch.manual_seed(width)
    rows = torch.arange(tokens, dtype=torch.int32) * 4096
    x, residual, gradient = (torch.randn(tokens, width).to(dtype) for _ in range(3))
    weight, bias, linear_bias = (torch.randn(width) for _ in range(3))
    if width == 1:
        residual = residual + 1  # one column: all variance is zero, so that only the bias remains

    def kernel(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor) -> Tensor:
        return add_layer_norm(
            x, residual, weight, bias, linear_bias=linear_bias, eps=1e-12, dropout_row=rows, dropout=dropout
        )

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, linear_bias: Tensor) -> Tensor:
        return _norm(residual + _drop(x + linear_bias.to(x.dtype), rows, dropout).to(x.dtype), weight, bias)

    return Case(kernel, plain, [x, residual, weight, bias, linear_bias], gradient)


def bias_gelu_case(width: int, dtype: torch.dtype, tokens: int = 150) -> Case:
    torch.manual_seed(width)
    x, gradient = 2 * torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    return Case(bias_gelu, lambda x, bias: F.gelu(x + bias.to(x.dtype)), [x, torch.randn(width)], gradient)


def embedding_case(
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    table_dtype: torch.dtype = torch.float32,
    tokens: int = 150,
) -> Case:
    torch.manual_seed(width)
    rows = torch.arange(tokens, dtype=torch.int32) * 4096
    ids = torch.randint(50, (tokens,), dtype=torch.int32)
    positions = torch.arange(tokens, dtype=torch.int32) % 40
    types = torch.arange(tokens, dtype=torch.int32) % 2
    tables = [torch.randn(n, width).to(table_dtype) for n in (50, 40, 2)]

    def kernel(words: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        # The exact twin is given float64 tables and answers in float64.
        return embedding(
            ids,
            types,
            positions,
            (words, position, token_type),
            weight,
            bias,
            eps=1e-12,
            dtype=dtype,
            dropout_row=rows,
            dropout=dropout,
        )

    def plain(words: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total = words[ids] + position[positions] + token_type[types]
        if total.dtype != torch.float64:
            total = total.to(dtype)
        return _drop(_norm(total, weight, bias), rows, dropout)

    gradient = torch.randn(tokens, width).to(dtype)
    return Case(kernel, plain, [*tables, torch.randn(width), torch.randn(width)], gradient)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 768, 20])
def test_add_layer_norm(
    instruction_set: str,
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoned(monkeypatch)
    add_layer_norm_case(width, dtype, dropout).check(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 384, 20])
def test_bias_gelu(
    instruction_set: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    bias_gelu_case(width, dtype).check(dtype)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [384, 20])
def test_embedding(
    instruction_set: str,
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoned(monkeypatch)
    embedding_case(width, dtype, dropout).check(dtype)


def test_embedding_with_bfloat16_tables(instruction_set: str) -> None:
    embedding_case(384, torch.bfloat16, DROPOUT, table_dtype=torch.bfloat16).check(torch.bfloat16)


def test_gelu_far_from_zero(instruction_set: str) -> None:
    """Relative accuracy in the left tail, and the limits."""
    x = torch.cat([torch.linspace(-12, -1, 500), torch.tensor([-200.0, 0.0, 200.0])])[None]
    exact = 0.5 * x.double() * torch.erfc(-x.double() * 0.5**0.5)
    found = bias_gelu(x, torch.zeros(x.shape[1])).double()
    tail = exact.abs() > 1e-30
    assert ((found - exact).abs()[tail] / exact.abs()[tail]).max() < 2e-5
    assert found[0, -3:].tolist() == [0.0, 0.0, 200.0]
    assert bias_gelu(torch.tensor([[float("nan")] * 20]), torch.zeros(20)).isnan().all()


def test_layer_norm_of_numbers_far_from_zero(instruction_set: str) -> None:
    """A large mean does not eat the variance."""
    x = torch.randn(8, 384) + 1000
    found = add_layer_norm(x, torch.zeros_like(x), torch.ones(384), torch.zeros(384), eps=1e-12)
    exact = F.layer_norm(x.double(), (384,), eps=1e-12)
    assert (found - exact).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("case", "parameters"),
    [
        (add_layer_norm_case(384, torch.bfloat16, DROPOUT), (2, 3, 4)),
        (bias_gelu_case(384, torch.bfloat16), (1,)),
        (embedding_case(384, torch.bfloat16, DROPOUT), (0, 1, 2, 3, 4)),
    ],
    ids=["add_layer_norm", "bias_gelu", "embedding"],
)
def test_frozen_parameters_get_no_gradient_and_change_no_other(
    cpu_kernels: None, case: Case, parameters: tuple[int, ...]
) -> None:
    everything = gradients(case.kernel, case.arguments, case.gradient)
    for frozen in [(p,) for p in parameters] + (
        [parameters] if len(parameters) < len(case.arguments) else []
    ):
        some = gradients(case.kernel, case.arguments, case.gradient, frozen=frozen)
        for index in range(len(case.arguments)):
            if index in frozen:
                assert some[index + 1] is None
            else:
                assert torch.equal(some[index + 1], everything[index + 1])


@pytest.mark.parametrize(
    "case",
    [
        add_layer_norm_case(384, torch.bfloat16, DROPOUT, tokens=1000),
        bias_gelu_case(384, torch.float32, tokens=1000),
        embedding_case(384, torch.bfloat16, DROPOUT, tokens=1000),
    ],
    ids=["add_layer_norm", "bias_gelu", "embedding"],
)
def test_deterministic_whatever_the_number_of_threads(cpu_kernels: None, case: Case) -> None:
    one = gradients(case.kernel, case.arguments, case.gradient)
    assert bit_equal(one, gradients(case.kernel, case.arguments, case.gradient))
    torch.set_num_threads(2)
    try:
        assert bit_equal(one, gradients(case.kernel, case.arguments, case.gradient))
    finally:
        torch.set_num_threads(1)


def test_parameters_keep_their_dtype(cpu_kernels: None) -> None:
    case = add_layer_norm_case(384, torch.bfloat16, None)
    found = gradients(case.kernel, case.arguments, case.gradient)
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 3


def test_reference_gradients() -> None:
    rows = torch.arange(6, dtype=torch.int32)
    x, residual = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight, bias, linear_bias = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda x, r, w, b, lb: reference.add_layer_norm(
            x, r, w, b, linear_bias=lb, eps=1e-5, dropout_row=rows, dropout=DROPOUT
        ),
        (x, residual, weight, bias, linear_bias),
    )
    assert torch.autograd.gradcheck(reference.bias_gelu, (x, bias))
    tables = tuple(torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 6, 2))
    assert torch.autograd.gradcheck(
        lambda *p: reference.embedding(
            rows % 7,
            rows % 2,
            rows,
            p[:3],
            *p[3:],
            eps=1e-5,
            dtype=torch.float64,
            dropout_row=rows,
            dropout=DROPOUT,
        ),
        (*tables, weight, bias),
    )


def test_empty_batches(cpu_kernels: None) -> None:
    for case in (
        add_layer_norm_case(384, torch.float32, DROPOUT, tokens=0),
        bias_gelu_case(384, torch.float32, 0),
    ):
        output, *grads = gradients(case.kernel, case.arguments, case.gradient)
        assert output.shape == (0, 384)
        assert all(g is not None and not g.any() for g in grads)


def test_an_index_outside_its_table(cpu_kernels: None) -> None:
    index = torch.tensor([0, 1, 2], dtype=torch.int32)
    tables = (torch.zeros(3, 8), torch.zeros(2, 8), torch.zeros(5, 8))
    with pytest.raises(ValueError, match="positions must be 0 to 1, got 2 at token 2"):
        embedding(index, index, index, tables, torch.ones(8), torch.ones(8), eps=1e-5, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(3, 9)}, r"residual must be of shape \[3, 8\]"),
        ({"residual": torch.zeros(3, 8, dtype=torch.bfloat16)}, "residual must be of dtype float32"),
        ({"weight": torch.zeros(7)}, r"weight must be of shape \[8\]"),
        ({"bias": torch.zeros(8, dtype=torch.int64)}, "bias must be of dtype"),
        ({"linear_bias": torch.zeros(16)[::2]}, "linear_bias must be contiguous"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "x": torch.zeros(3, 8),
        "residual": torch.zeros(3, 8),
        "weight": torch.ones(8),
        "bias": torch.ones(8),
    }
    with pytest.raises(ValueError, match=f"add_layer_norm: {message}"):
        add_layer_norm(**(arguments | change), eps=1e-5)

"""Dropout: the same bits in every implementation, its gradient, and its errors."""

from __future__ import annotations

import pytest
import torch
from support.kernel_checks import DROPOUT, gradients, poisoned

from mtbert.kernels import Dropout, dispatch, dropout, reference

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 24, 63, 64, 65, 384, 1023, 1025, 1500])
def test_mask_and_values_are_the_reference_s_bit_for_bit(
    instruction_set: str, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(columns)
    x = torch.randn(37, columns).to(dtype)
    rows = torch.randint(-(2**31), 2**31 - 1, (37,), dtype=torch.int32)
    expected = reference.dropout(x, rows, DROPOUT)
    kept = reference.dropout_mask(rows, torch.arange(columns), DROPOUT)
    poisoned(monkeypatch)
    found = dropout(x, rows, DROPOUT)
    assert torch.equal(found, expected)
    assert torch.equal(found != 0, kept & (x != 0))


@pytest.mark.parametrize("p", [0.0001, 0.5, 0.99])
def test_rates(instruction_set: str, p: float) -> None:
    x, rows = torch.ones(64, 200), torch.arange(64, dtype=torch.int32)
    chosen = Dropout(p=p, seed=2**64 - 1, step=2**32 - 1, site=2**32 - 1)
    assert torch.equal(dropout(x, rows, chosen), reference.dropout(x, rows, chosen))


def test_a_mask_with_enough_columns_to_leave_one_tile(instruction_set: str) -> None:
    x, rows = torch.ones(2, 5000), torch.tensor([3, -7], dtype=torch.int32)
    assert torch.equal(dropout(x, rows, DROPOUT), reference.dropout(x, rows, DROPOUT))


def test_gradient_is_masked_alike(cpu_kernels: None) -> None:
    x, rows = torch.randn(20, 33), torch.arange(20, dtype=torch.int32)
    _, gradient = gradients(lambda x: dropout(x, rows, DROPOUT), [x], torch.ones(20, 33))
    kept = reference.dropout_mask(rows, torch.arange(33), DROPOUT)
    assert torch.equal(gradient, torch.where(kept, torch.tensor(DROPOUT.scale, dtype=torch.float32), 0.0))


def test_what_is_dropped_may_be_nan(cpu_kernels: None) -> None:
    rows = torch.arange(8, dtype=torch.int32)
    kept = reference.dropout_mask(rows, torch.arange(64), DROPOUT)
    x = torch.where(kept, 1.0, float("nan"))
    assert torch.isfinite(dropout(x, rows, DROPOUT)).all()


def test_reference_gradient() -> None:
    x = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(5, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: reference.dropout(x, rows, DROPOUT), x)


def test_the_number_of_threads_changes_nothing(cpu_kernels: None) -> None:
    x, rows = torch.randn(300, 384), torch.arange(300, dtype=torch.int32)
    one = dropout(x, rows, DROPOUT)
    torch.set_num_threads(3)
    try:
        assert torch.equal(dropout(x, rows, DROPOUT), one)
    finally:
        torch.set_num_threads(1)


def test_nothing_to_drop_and_nothing_at_all() -> None:
    x, rows = torch.randn(4, 5), torch.arange(4, dtype=torch.int32)
    assert dropout(x, rows, None) is x
    assert dropout(x, rows, Dropout(p=0.0, seed=0, step=0, site=0)) is x
    with dispatch.use_backend("auto"):
        assert dropout(torch.empty(0, 5), rows[:0], DROPOUT).shape == (0, 5)


@pytest.mark.parametrize(
    ("x", "rows", "message"),
    [
        (
            torch.ones(4),
            torch.arange(4, dtype=torch.int32),
            r"x must be of shape \[any, any\], got shape \[4\]",
        ),
        (
            torch.ones(4, 3, dtype=torch.int32),
            torch.arange(4, dtype=torch.int32),
            "x must be of dtype float64",
        ),
        (torch.ones(3, 4).t(), torch.arange(4, dtype=torch.int32), "x must be contiguous"),
        (torch.ones(4, 3), torch.arange(4), "dropout_row must be of dtype int32, got int64"),
        (torch.ones(4, 3), torch.arange(3, dtype=torch.int32), r"dropout_row must be of shape \[4\]"),
        (torch.ones(4, 3), None, "dropout_row must be given"),
    ],
)
def test_errors_name_the_argument(x: torch.Tensor, rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout(x, rows, DROPOUT)

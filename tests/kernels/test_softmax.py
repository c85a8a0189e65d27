"""The plain PyTorch twin of softmax, and what the public function refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_checks import DROPOUT, gradients

from mtbert.kernels import dispatch, reference, softmax

NAN = float("nan")
ROWS = torch.arange(6, dtype=torch.int32) * 5
LENGTHS = torch.tensor([9, 0, 1, 5, 8, 3], dtype=torch.int32)


def test_every_row_is_the_softmax_of_its_leading_columns() -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    found = softmax(x, lengths=LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        assert torch.allclose(found[row, :length], torch.softmax(x[row, :length], 0), rtol=1e-14, atol=0)
        assert not found[row, length:].any()
    assert torch.equal(softmax(x), torch.softmax(x, 1))


def test_dropout_is_that_of_the_mask() -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    kept = reference.dropout_mask(ROWS, torch.arange(9), DROPOUT)
    expected = torch.where(kept, softmax(x, lengths=LENGTHS) * DROPOUT.scale, 0.0)
    assert torch.equal(softmax(x, lengths=LENGTHS, dropout_row=ROWS, dropout=DROPOUT), expected)
    assert not kept.all()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "ragged"])
def test_gradient(lengths: torch.Tensor | None, dropout: Any) -> None:
    x = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: reference.softmax(x, lengths=lengths, dropout_row=ROWS, dropout=dropout), x
    )


def test_what_stands_beyond_a_length_reaches_nothing() -> None:
    x, upstream = torch.randn(6, 9), torch.randn(6, 9)
    beyond = torch.arange(9) >= LENGTHS[:, None]
    clean = gradients(lambda x: softmax(x, lengths=LENGTHS), [x], upstream)
    spoiled = gradients(
        lambda x: softmax(x, lengths=LENGTHS), [x.masked_fill(beyond, NAN)], upstream.masked_fill(beyond, NAN)
    )
    for c, s in zip(clean, spoiled, strict=True):
        assert torch.equal(c, s)  # type: ignore[arg-type]
        assert not c[beyond].any()  # type: ignore[index]


def test_half_width_is_rounded_once() -> None:
    x = torch.randn(6, 9).bfloat16()
    assert torch.equal(softmax(x), torch.softmax(x.float(), 1).bfloat16())


def test_nothing_at_all() -> None:
    assert softmax(torch.empty(0, 9), lengths=LENGTHS[:0]).shape == (0, 9)
    assert softmax(torch.empty(3, 0)).shape == (3, 0)


def test_without_a_cpp_implementation_the_reference_serves() -> None:
    """So that `--kernels cpu` starts."""
    with dispatch.use_backend("cpu"):
        assert dispatch.select("softmax", device="cpu", dtype=torch.float32)[0] == "reference"
        assert torch.equal(softmax(torch.ones(2, 4)), torch.full((2, 4), 0.25))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6)}, r"x must be of shape \[any, any\], got shape \[6\]"),
        ({"x": torch.zeros(6, 4, dtype=torch.int32)}, "x must be of dtype float64"),
        ({"x": torch.zeros(4, 6).t()}, "x must be contiguous"),
        ({"lengths": LENGTHS.long()}, "lengths must be of dtype int32, got int64"),
        ({"lengths": LENGTHS[1:]}, r"lengths must be of shape \[6\]"),
        ({"dropout": DROPOUT}, "dropout_row must be given"),
        ({"dropout": DROPOUT, "dropout_row": ROWS[1:]}, r"dropout_row must be of shape \[6\]"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"softmax: {message}"):
        softmax(**({"x": torch.zeros(6, 4)} | change))

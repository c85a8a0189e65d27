"""Softmax by the Triton kernels: accuracy, lengths, dropout, both tiles, and the operator's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout, reference, softmax
from mtbert.kernels.triton_ops import softmax as operation
from mtbert.kernels.triton_ops.launch import mask_arguments

# A row of nothing, or of nothing but -inf, subtracts it from itself and divides by zero; a GPU says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
WIDE = 4096
"""Rows of more columns go through a loop."""


def ragged(columns: int, device: torch.device) -> Tensor:
    """The lengths that matter, as far as they fit, with an empty row and a whole one."""
    wanted = [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 512]
    if columns >= WIDE:
        wanted = [0, 33, WIDE, WIDE + 1]
    lengths = [length for length in wanted if length < columns]
    return torch.tensor([*lengths, columns], dtype=torch.int32, device=device)


def mask_rows(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device) * 4096 + 3


def plain(x: Tensor, lengths: Tensor | None, rows: Tensor, dropout: Dropout | None) -> Tensor:
    """PyTorch's own operations, step by step in the dtype of x."""
    column = torch.arange(x.shape[1], device=x.device)
    inside = torch.ones_like(x, dtype=torch.bool) if lengths is None else column < lengths[:, None]
    value = torch.where(inside, x, -INF).softmax(1)
    value = torch.where(inside, value, 0.0)
    if dropout is None:
        return value
    return torch.where(reference.dropout_mask(rows, column, dropout), value * dropout.scale, 0.0)


def check(
    columns: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    lengths: Tensor | None,
    device: torch.device,
    count: int,
) -> None:
    torch.manual_seed(columns)
    x = (2 * torch.randn(count, columns)).to(dtype).to(device)
    upstream = torch.randn(count, columns).to(dtype).to(device)
    rows = mask_rows(count, device)
    found = gradients(lambda x: softmax(x, lengths=lengths, dropout_row=rows, dropout=dropout), [x], upstream)
    in_dtype = gradients(lambda x: plain(x, lengths, rows, dropout), [x], upstream)
    exact = gradients(lambda x: plain(x, lengths, rows, dropout), [x.double()], upstream.double())
    assert_accurate(found, in_dtype, exact, dtype)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 512, 1000, WIDE])
def test_rows_of_one_tile(
    device: torch.device,
    columns: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = ragged(columns, device)
    # Enough rows that the greatest of PyTorch's own errors is no accident.
    lengths = lengths.repeat(1 if columns > 512 else 5)
    poisoned(monkeypatch)
    check(columns, dtype, dropout, lengths, device, len(lengths))


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize(("columns", "dtype"), [(5000, torch.float32), (9001, torch.bfloat16)])
def test_longer_rows(
    device: torch.device,
    columns: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = ragged(columns, device)
    poisoned(monkeypatch)
    check(columns, dtype, dropout, lengths, device, len(lengths))


@pytest.mark.parametrize("columns", [20, 64, 5000])
def test_whole_rows_without_lengths(
    device: torch.device, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    check(columns, torch.float32, DROPOUT, None, device, 3)


@pytest.mark.parametrize("columns", [40, 5000])
def test_what_stands_beyond_a_length_reaches_nothing(device: torch.device, columns: int) -> None:
    lengths = ragged(columns, device)
    x = torch.randn(len(lengths), columns, device=device)
    upstream = torch.randn(len(lengths), columns, device=device)
    beyond = torch.arange(columns, device=device) >= lengths[:, None]
    for spoiler in (NAN, INF):
        clean = gradients(lambda x: softmax(x, lengths=lengths), [x], upstream)
        spoiled = gradients(
            lambda x: softmax(x, lengths=lengths),
            [x.masked_fill(beyond, spoiler)],
            upstream.masked_fill(beyond, spoiler),
        )
        assert bit_equal(clean, spoiled)
        assert all(tensor is not None and not tensor[beyond].any() for tensor in clean)


@pytest.mark.parametrize("columns", [40, 5000])
def test_what_is_wrong_in_a_row_stays_in_it(device: torch.device, columns: int) -> None:
    lengths = torch.tensor([columns, 30, columns, 30], dtype=torch.int32, device=device)
    x, upstream = (torch.randn(4, columns, device=device) for _ in range(2))
    clean = gradients(lambda x: softmax(x, lengths=lengths), [x], upstream)
    for spoiler in (NAN, INF):
        spoiled = x.clone()
        spoiled[1, 7] = spoiler
        found = gradients(lambda x: softmax(x, lengths=lengths), [spoiled], upstream)
        for c, f in zip(clean, found, strict=True):
            assert c is not None
            assert f is not None
            assert f[1, :30].isnan().all()
            assert not f[1, 30:].any()
            assert torch.equal(c[[0, 2, 3]], f[[0, 2, 3]])


@pytest.mark.parametrize("columns", [40, 9000])
def test_scores_of_minus_infinity(device: torch.device, columns: int) -> None:
    """As PyTorch has it: nothing where some score is finite, NaN where none is. A whole block of them comes first."""
    x = torch.randn(3, columns, device=device)
    x[0, : columns - 8] = -INF
    x[1, 3] = -INF
    x[2] = -INF
    found = softmax(x)
    assert torch.allclose(found, torch.softmax(x, 1), rtol=1e-5, atol=1e-7, equal_nan=True)
    assert found[2].isnan().all()


def test_large_scores(device: torch.device) -> None:
    """The maximum is taken out, and the sum is kept beside it, not added to it."""
    x = torch.randn(4, 100, device=device) + 30000
    found = gradients(softmax, [x], torch.randn(4, 100, device=device))
    assert (found[0].double() - torch.softmax(x.double(), 1)).abs().max() < 1e-6  # type: ignore[union-attr]
    assert found[1] is not None
    assert found[1].sum(1).abs().max() < 1e-6


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    x, rows = torch.randn(4, 40, device=device), mask_rows(4, device)
    here = Dropout(p=0.3, seed=2**64 - 1, step=2**32 - 1, site=2**32 - 1)
    there = Dropout(
        p=0.3, seed=2**64 - 1, step=torch.tensor(2**32 - 1, device=device), site=2**32 - 1
    )  # fmt: skip
    upstream = torch.randn(4, 40, device=device)
    found = [
        gradients(lambda x, d=d: softmax(x, dropout_row=rows, dropout=d), [x], upstream)
        for d in (here, there)
    ]
    assert bit_equal(*found)


@pytest.mark.parametrize("columns", [300, 5000])
def test_two_runs_are_equal_and_rows_do_not_see_each_other(device: torch.device, columns: int) -> None:
    lengths = ragged(columns, device)
    count = len(lengths)
    x, upstream = (torch.randn(count, columns, device=device) for _ in range(2))
    rows = mask_rows(count, device)

    def run(x: Tensor) -> list[Tensor | None]:
        return gradients(
            lambda x: softmax(x, lengths=lengths, dropout_row=rows, dropout=DROPOUT), [x], upstream
        )

    once = run(x)
    assert bit_equal(once, run(x))
    changed = x.clone()
    changed[2] += torch.randn(columns, device=device)
    others = [row for row in range(count) if row != 2]
    assert bit_equal([t[others] for t in once], [t[others] for t in run(changed)])  # type: ignore[index]


def test_nothing_at_all(device: torch.device) -> None:
    for shape in ((0, 5), (3, 0)):
        x = torch.empty(shape, device=device, requires_grad=True)
        found = softmax(x)
        found.sum().backward()
        assert found.shape == shape
        assert x.grad is not None


def test_the_operators_keep_torch_s_rules(device: torch.device) -> None:
    x = torch.randn(3, 24, device=device, requires_grad=True)
    lengths = torch.tensor([0, 11, 24], dtype=torch.int32, device=device)
    rows, mask = mask_rows(3, device), mask_arguments(DROPOUT)
    torch.library.opcheck(operation._softmax, (x, lengths, rows, *mask))
    torch.library.opcheck(
        operation._softmax, (x, None, None, *mask_arguments(None)), test_utils="test_faketensor"
    )
    saved = [t.detach() for t in operation._softmax(x, lengths, rows, *mask)]
    arguments = (torch.randn_like(x), x.detach(), lengths, *saved[1:], rows, *mask)
    torch.library.opcheck(operation._softmax_backward, arguments, test_utils="test_faketensor")


def test_compiles_into_one_graph(device: torch.device) -> None:
    lengths, rows = torch.tensor([3, 20], dtype=torch.int32, device=device), mask_rows(2, device)

    def double(x: Tensor) -> Tensor:
        return 2 * softmax(x, lengths=lengths, dropout_row=rows, dropout=DROPOUT)

    x, upstream = (torch.randn(2, 20, device=device) for _ in range(2))
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert bit_equal(gradients(compiled, [x], upstream), gradients(double, [x], upstream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4).t()}, "x must be contiguous"),
        ({"lengths": torch.zeros(4, dtype=torch.int64)}, "lengths must be of dtype int32, got int64"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths must be of shape \[4\]"),
        ({"dropout": DROPOUT}, "dropout_row must be given"),
    ],
)
def test_what_does_not_fit_is_refused(device: torch.device, change: dict[str, Any], message: str) -> None:
    moved = {n: v.to(device) if isinstance(v, Tensor) and n != "x" else v for n, v in change.items()}
    arguments: dict[str, Any] = {"x": torch.zeros(4, 8, device=device)} | moved
    with pytest.raises(ValueError, match=f"softmax: {message}"):
        softmax(**arguments)


def test_float64_is_not_for_triton(device: torch.device) -> None:
    with pytest.raises(ConfigError, match="the dtype must be float32 or bfloat16 or float16"):
        softmax(torch.zeros(2, 3, dtype=torch.float64, device=device))

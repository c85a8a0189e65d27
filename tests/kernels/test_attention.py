"""Attention over packed rows: accuracy, isolation of sequences, determinism, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.kernels import Dropout, attention, reference

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 15, 16, 17, 0, 31, 32, 33, 63, 64, 65)


def _packed(
    lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype, before: int = 0, after: int = 0
):
    """qkv, cu_seqlens, dropout_row and an output gradient, with tokens of no sequence before and after."""
    cu = torch.tensor([before, *lengths]).cumsum(0).to(torch.int32)
    tokens = int(cu[-1]) + after
    torch.manual_seed(tokens + width)
    qkv = torch.randn(tokens, 3, heads, width).to(dtype)
    rows = torch.cat(
        [torch.zeros(before, dtype=torch.int64)]
        + [n * 4096 + torch.arange(length) for n, length in enumerate(lengths)]
        + [torch.zeros(after, dtype=torch.int64)]
    ).to(torch.int32)
    return qkv, cu, rows, torch.randn(tokens, heads, width).to(dtype)


def _call(
    cu: Tensor, longest: int, scale: float, rows: Tensor, dropout: Dropout | None
) -> Callable[[Tensor], Tensor]:
    return lambda qkv: attention(qkv, cu, longest, scale=scale, dropout_row=rows, dropout=dropout)


def _plain(cu: Tensor, scale: float, rows: Tensor, dropout: Dropout | None) -> Callable[[Tensor], Tensor]:
    """Every step in the dtype of qkv, sequence by sequence, as plain PyTorch would have it."""

    def run(qkv: Tensor) -> Tensor:
        outputs = [torch.zeros_like(qkv[: int(cu[0]), 0])]
        for first, last in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            q, k, v = qkv[first:last].permute(1, 2, 0, 3)
            p = (q @ k.transpose(1, 2) * scale).softmax(-1)
            if dropout is not None and last > first:
                heads = [
                    reference.dropout_mask(rows[first:last], h * 4096 + torch.arange(last - first), dropout)
                    for h in range(qkv.shape[2])
                ]
                p = torch.where(torch.stack(heads), p * dropout.scale, 0.0)
            outputs.append((p.to(v.dtype) @ v).transpose(0, 1))
        outputs.append(torch.zeros_like(qkv[int(cu[-1]) :, 0]))
        return torch.cat(outputs)

    return run


def _check(
    lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype, dropout: Dropout | None
) -> None:
    qkv, cu, rows, gradient = _packed(lengths, heads, width, dtype, before=2, after=3)
    scale = width**-0.5
    found = gradients(_call(cu, max(lengths), scale, rows, dropout), [qkv], gradient)
    plain = gradients(_plain(cu, scale, rows, dropout), [qkv], gradient)
    exact = gradients(_plain(cu, scale, rows, dropout), [qkv.double()], gradient.double())
    assert_accurate(found, plain, exact, dtype)
    # The gradients of queries, keys and values are of different sizes: each by itself.
    for part in range(3):
        assert_accurate([found[1][:, part]], [plain[1][:, part]], [exact[1][:, part]], dtype)
    for tensor in found:
        assert tensor is not None
        assert not tensor[:2].any()
        assert not tensor[-3:].any()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64])
def test_accuracy(
    instruction_set: str,
    width: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoned(monkeypatch)
    _check(LENGTHS, 3, width, dtype, dropout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(127, 128, 129), (512,)])
def test_accuracy_of_long_rows(instruction_set: str, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    _check(lengths, 2, 32, dtype, DROPOUT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 80, 128])
def test_accuracy_of_other_widths(instruction_set: str, width: int, dtype: torch.dtype) -> None:
    _check((5, 40, 70), 2, width, dtype, DROPOUT)


def test_scores_far_apart(instruction_set: str) -> None:
    """Where the greatest score exceeds others by thousands, nothing overflows and the weights add up to one."""
    qkv, cu, rows, gradient = _packed((20, 33), 2, 32, torch.float32)
    qkv[:, :2] *= 100
    qkv[:, 2] = 1
    output, gradient = gradients(_call(cu, 33, 1.0, rows, None), [qkv], gradient)
    assert (output - 1).abs().max() < 1e-6
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_leak(instruction_set: str, dtype: torch.dtype) -> None:
    lengths = (17, 30, 0, 64, 5)
    qkv, cu, rows, gradient = _packed(lengths, 2, 32, dtype)
    before = gradients(_call(cu, 64, 0.2, rows, DROPOUT), [qkv], gradient)
    changed, changed_gradient = qkv.clone(), gradient.clone()
    changed[17:47] = float("nan")
    changed_gradient[17:47] = float("inf")
    after = gradients(_call(cu, 64, 0.2, rows, DROPOUT), [changed], changed_gradient)
    for b, a in zip(before, after, strict=True):
        assert b is not None
        assert a is not None
        assert torch.equal(b[:17], a[:17])
        assert torch.equal(b[47:], a[47:])
        assert a[17:47].isnan().any()  # and what is not a number stays visible


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_outside_the_sequences_reach_nothing(instruction_set: str, dtype: torch.dtype) -> None:
    qkv, cu, rows, gradient = _packed((17, 30), 2, 32, dtype, before=1, after=2)
    qkv[0], qkv[-2:] = float("nan"), float("nan")
    gradient[0], gradient[-2:] = float("nan"), float("nan")
    for tensor in gradients(_call(cu, 32, 0.2, rows, DROPOUT), [qkv], gradient):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_whatever_the_number_of_threads(cpu_kernels: None, dtype: torch.dtype) -> None:
    lengths = (*range(1, 40), 150)
    qkv, cu, rows, gradient = _packed(lengths, 4, 32, dtype)
    call = _call(cu, 150, 0.2, rows, DROPOUT)
    one = gradients(call, [qkv], gradient)
    assert bit_equal(one, gradients(call, [qkv], gradient))
    torch.set_num_threads(2)
    try:
        assert bit_equal(one, gradients(call, [qkv], gradient))
    finally:
        torch.set_num_threads(1)


def test_a_gradient_that_is_not_contiguous(cpu_kernels: None) -> None:
    qkv, cu, rows, _ = _packed((9, 4), 2, 32, torch.float32)
    qkv.requires_grad_()
    attention(qkv, cu, 16, scale=0.2, dropout_row=rows, dropout=None).sum().backward()
    expanded, qkv.grad = qkv.grad, None
    attention(qkv, cu, 16, scale=0.2, dropout_row=rows, dropout=None).backward(torch.ones(13, 2, 32))
    assert torch.equal(expanded, qkv.grad)


def test_reference_gradient_and_sequences() -> None:
    qkv, cu, rows, _ = _packed((3, 0, 5, 9), 2, 4, torch.float64, before=1, after=2)
    qkv.requires_grad_()

    def call(qkv: Tensor) -> Tensor:
        return reference.attention(qkv, cu, 16, scale=0.5, dropout_row=rows, dropout=DROPOUT)

    assert torch.autograd.gradcheck(call, qkv)
    assert torch.allclose(call(qkv), _plain(cu, 0.5, rows, DROPOUT)(qkv), atol=1e-12)


def test_reference_in_groups_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, cu, rows, _ = _packed((3, 7, 5, 9), 2, 4, torch.float64)
    whole = reference.attention(qkv, cu, 16, scale=0.5, dropout_row=rows, dropout=DROPOUT)
    monkeypatch.setattr(reference, "_MAX_SCORES", 1)
    parts = reference.attention(qkv, cu, 16, scale=0.5, dropout_row=rows, dropout=DROPOUT)
    assert torch.allclose(whole, parts, atol=1e-14)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(6, 2, 2, 32)}, r"qkv must be of shape \[any, 3, any, any\]"),
        ({"qkv": torch.zeros(6, 3, 32, 2).transpose(2, 3)}, "qkv must be contiguous"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be of dtype int32"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int32)}, "cu_seqlens must be of at least one element"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 2, 6], dtype=torch.int32)},
            "cu_seqlens must ascend within 0 to 6",
        ),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens must ascend within 0 to 6"),
        ({"max_seqlen": 5}, "max_seqlen is 5, but sequence 0 has 6 tokens"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"dropout": DROPOUT}, "dropout_row must be given"),
    ],
)
def test_errors_name_the_argument(cpu_kernels: None, change: dict[str, object], message: str) -> None:
    arguments = {
        "qkv": torch.zeros(6, 3, 2, 32),
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "max_seqlen": 32,
        "scale": 0.2,
    }
    with pytest.raises(ValueError, match=message):
        attention(**(arguments | change))  # type: ignore[arg-type]

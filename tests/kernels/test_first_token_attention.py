"""Attention of one query a sequence: what full attention gives at first tokens, accuracy, isolation, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.kernels import Dropout, dispatch, extension, first_token_attention, reference

DTYPES = (torch.float32, torch.bfloat16)
_cpu = extension.part("cpu")
LENGTHS = (1, 15, 16, 0, 17, 31, 32, 33, 127, 128, 129, 0)
HEADS, WIDTH, SCALE = 3, 32, 0.2


def _packed(
    lengths: tuple[int, ...], dtype: torch.dtype, before: int = 0, after: int = 0, width: int = WIDTH
):
    """Queries, keys and values, cu_seqlens, dropout rows, an output gradient; tokens of no sequence around them."""
    cu = torch.tensor([before, *lengths]).cumsum(0).to(torch.int32)
    tokens = int(cu[-1]) + after
    torch.manual_seed(tokens)
    query = torch.randn(len(lengths), HEADS, width).to(dtype)
    key_value = torch.randn(tokens, 2, HEADS, width).to(dtype)
    rows = (torch.arange(len(lengths)) * 4096 + 5).to(torch.int32)
    return query, key_value, cu, rows, torch.randn(len(lengths), HEADS, width).to(dtype)


def _call(cu: Tensor, rows: Tensor, dropout: Dropout | None, longest: int = 512) -> Callable[..., Tensor]:
    return lambda query, key_value: first_token_attention(
        query, key_value, cu, longest, scale=SCALE, dropout_row=rows, dropout=dropout
    )


def _plain(cu: Tensor, rows: Tensor, dropout: Dropout | None) -> Callable[..., Tensor]:
    """Every step in the dtype of query, sequence by sequence, as plain PyTorch would have it."""

    def run(query: Tensor, key_value: Tensor) -> Tensor:
        outputs = []
        for n, (first, last) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
            if first == last:
                outputs.append(torch.zeros_like(query[n]))
                continue
            k, v = key_value[first:last].permute(1, 2, 0, 3)
            p = (query[n][:, None] @ k.transpose(1, 2) * SCALE).softmax(-1)
            if dropout is not None:
                columns = torch.cat([h * 4096 + torch.arange(last - first) for h in range(HEADS)])
                kept = reference.dropout_mask(rows[n : n + 1], columns, dropout).view(HEADS, 1, -1)
                p = torch.where(kept, p * dropout.scale, 0.0)
            outputs.append((p.to(v.dtype) @ v)[:, 0])
        return torch.stack(outputs)

    return run


@pytest.fixture(params=[*(_cpu.instruction_sets() if _cpu is not None else []), "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every implementation, the C++ one in each instruction set that this processor has."""
    if request.param == "reference":
        with dispatch.use_backend("reference"):
            yield request.param
    else:
        assert _cpu is not None
        before = _cpu.instruction_set()
        _cpu.set_instruction_set(request.param)
        with dispatch.use_backend("auto"):
            yield request.param
        _cpu.set_instruction_set(before)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [LENGTHS, (512,), (1,)])
def test_accuracy(
    backend: str,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key_value, cu, rows, gradient = _packed(lengths, dtype, before=2, after=3)
    poisoned(monkeypatch)
    found = gradients(_call(cu, rows, dropout), [query, key_value], gradient)
    plain = gradients(_plain(cu, rows, dropout), [query, key_value], gradient)
    exact = gradients(_plain(cu, rows, dropout), [query.double(), key_value.double()], gradient.double())
    assert_accurate(found, plain, exact, dtype)
    for part in range(2):  # the gradients of keys and values are of different sizes: each by itself
        assert_accurate([found[2][:, part]], [plain[2][:, part]], [exact[2][:, part]], dtype)  # type: ignore[index]
    assert not found[2][:2].any()  # type: ignore[index]
    assert not found[2][-3:].any()  # type: ignore[index]


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_it_is_full_attention_at_the_first_tokens(backend: str, dropout: Dropout | None) -> None:
    lengths = (17, 1, 40, 8, 9)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = torch.cat([n * 4096 + torch.arange(length) for n, length in enumerate(lengths)]).to(torch.int32)
    places = cu[:-1].long()
    qkv = torch.randn(sum(lengths), 3, HEADS, WIDTH, dtype=torch.float64)
    full = reference.attention(qkv, cu, 64, scale=SCALE, dropout_row=rows, dropout=dropout)[places]
    query, key_value = qkv[places, 0].contiguous(), qkv[:, 1:].contiguous()
    found = _call(cu, rows[places].contiguous(), dropout)(query, key_value)
    assert torch.allclose(found, full, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_do_not_leak(backend: str, dtype: torch.dtype) -> None:
    query, key_value, cu, rows, gradient = _packed((17, 30, 0, 64, 5), dtype)
    before = gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient)
    query[1], key_value[17:47], gradient[1] = float("nan"), float("nan"), float("inf")
    after = gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient)
    for index, (b, a) in enumerate(zip(before, after, strict=True)):
        assert b is not None
        assert a is not None
        first, last = (17, 47) if index == 2 else (1, 2)
        assert torch.equal(b[:first], a[:first])
        assert torch.equal(b[last:], a[last:])
        assert a[first:last].isnan().any()  # and what is not a number stays visible


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_outside_the_sequences_reach_nothing(backend: str, dtype: torch.dtype) -> None:
    query, key_value, cu, rows, gradient = _packed((17, 30), dtype, before=1, after=2)
    key_value[0], key_value[-2:] = float("nan"), float("nan")
    for tensor in gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient):
        assert tensor is not None
        assert torch.isfinite(tensor).all()


def test_scores_far_apart(backend: str) -> None:
    query, key_value, cu, rows, gradient = _packed((20, 33), torch.float32)
    query, key_value = query * 100, torch.stack((key_value[:, 0] * 100, torch.ones_like(key_value[:, 1])), 1)
    found = gradients(_call(cu, rows, None), [query, key_value], gradient)
    assert (found[0] - 1).abs().max() < 1e-6  # type: ignore[operator]
    assert all(torch.isfinite(tensor).all() for tensor in found if tensor is not None)


def test_deterministic_whatever_the_number_of_threads(backend: str) -> None:
    query, key_value, cu, rows, gradient = _packed((*range(1, 40), 150), torch.bfloat16)
    one = gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient)
    torch.set_num_threads(2)
    try:
        assert bit_equal(one, gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
def test_accuracy_of_other_widths(backend: str, width: int, dtype: torch.dtype) -> None:
    query, key_value, cu, rows, gradient = _packed((5, 40, 70), dtype, width=width)
    found = gradients(_call(cu, rows, DROPOUT), [query, key_value], gradient)
    plain = gradients(_plain(cu, rows, DROPOUT), [query, key_value], gradient)
    exact = gradients(_plain(cu, rows, DROPOUT), [query.double(), key_value.double()], gradient.double())
    assert_accurate(found, plain, exact, dtype)


def test_a_sequence_longer_than_said_is_refused(cpu_kernels: None) -> None:
    query, key_value, cu, rows, _ = _packed((5, 40), torch.float32)
    with pytest.raises(ValueError, match="max_seqlen is 32, but sequence 1 has 40 tokens"):
        _call(cu, rows, None, 32)(query, key_value)


def test_no_sequences_and_no_tokens(backend: str) -> None:
    for sequences, tokens in ((0, 0), (0, 4), (2, 0)):
        query = torch.randn(sequences, HEADS, WIDTH).requires_grad_()
        key_value = torch.randn(tokens, 2, HEADS, WIDTH).requires_grad_()
        cu, rows = torch.zeros(sequences + 1, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)
        found = _call(cu, rows, DROPOUT)(query, key_value)
        found.sum().backward()
        assert found.shape == query.shape
        assert not found.any()
        assert not query.grad.any()  # type: ignore[union-attr]
        assert not key_value.grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 2)}, "query must be of shape"),
        ({"key_value": torch.zeros(6, 3, 2, 32)}, r"key_value must be of shape \[any, 2, 2, 32\]"),
        ({"key_value": torch.zeros(6, 2, 2, 32).bfloat16()}, "key_value must be of dtype float32"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be of dtype int32"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int32)}, r"cu_seqlens must be of shape \[2\]"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1"),
        (
            {"max_seqlen": 5000, "dropout": DROPOUT, "dropout_row": torch.zeros(1, dtype=torch.int32)},
            "at most 4096",
        ),
        ({"scale": 0.0}, "scale must be positive"),
        ({"dropout": DROPOUT}, "dropout_row must be given"),
        (
            {"dropout": DROPOUT, "dropout_row": torch.zeros(6, dtype=torch.int32)},
            r"dropout_row must be of shape \[1\]",
        ),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 2, 32),
        "key_value": torch.zeros(6, 2, 2, 32),
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "max_seqlen": 32,
        "scale": 0.2,
    }
    with pytest.raises(ValueError, match=message):
        first_token_attention(**(arguments | change))

"""Attention by the Triton kernels: accuracy, isolation of sequences, determinism, the rules of an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout, attention, reference
from mtbert.kernels.triton_ops import attention as operation
from mtbert.kernels.triton_ops.launch import mask_arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GREATEST = Dropout(p=0.3, seed=2**64 - 1, step=2**32 - 1, site=2**32 - 1)


class Batch:
    """Packed sequences of random numbers, with tokens of no sequence before and after them."""

    def __init__(
        self,
        device: torch.device,
        lengths: Sequence[int],
        heads: int,
        width: int,
        dtype: torch.dtype,
        outside: tuple[int, int] = (2, 3),
    ) -> None:
        before, after = outside
        cu = torch.tensor([before, *lengths]).cumsum(0)
        tokens = int(cu[-1]) + after
        torch.manual_seed(tokens + width)
        self.cu = cu.to(torch.int32).to(device)
        self.longest = max(lengths)
        self.qkv = torch.randn(tokens, 3, heads, width).to(dtype).to(device)
        self.gradient = torch.randn(tokens, heads, width).to(dtype).to(device)
        self.rows = torch.randint(-(2**31), 2**31 - 1, (tokens,), dtype=torch.int32).to(device)
        self.scale = width**-0.5

    def call(self, dropout: Dropout | None, longest: int | None = None) -> Callable[[Tensor], Tensor]:
        """Attention as a function of qkv."""

        def run(qkv: Tensor) -> Tensor:
            most = longest or self.longest
            return attention(qkv, self.cu, most, scale=self.scale, dropout_row=self.rows, dropout=dropout)

        return run

    def plain(self, dropout: Dropout | None) -> Callable[[Tensor], Tensor]:
        """The same, every step in the dtype of qkv, sequence by sequence."""

        def run(qkv: Tensor) -> Tensor:
            outputs = [torch.zeros_like(qkv[: int(self.cu[0]), 0])]
            for first, last in zip(self.cu[:-1].tolist(), self.cu[1:].tolist(), strict=True):
                q, k, v = qkv[first:last].permute(1, 2, 0, 3)
                p = (q @ k.transpose(1, 2) * self.scale).softmax(-1)
                if dropout is not None and last > first:
                    keys = torch.arange(last - first, device=qkv.device)
                    kept = [
                        reference.dropout_mask(self.rows[first:last], h * 4096 + keys, dropout)
                        for h in range(qkv.shape[2])
                    ]
                    p = torch.where(torch.stack(kept), p * dropout.scale, 0.0)
                outputs.append((p.to(v.dtype) @ v).transpose(0, 1))
            outputs.append(torch.zeros_like(qkv[int(self.cu[-1]) :, 0]))
            return torch.cat(outputs)

        return run

    def results(self, dropout: Dropout | None, longest: int | None = None) -> list[Tensor | None]:
        """The output and the gradient of qkv."""
        return gradients(self.call(dropout, longest), [self.qkv], self.gradient)


def _check(batch: Batch, dropout: Dropout | None) -> None:
    qkv, gradient = batch.qkv, batch.gradient
    found = batch.results(dropout)
    plain = gradients(batch.plain(dropout), [qkv], gradient)
    exact = gradients(batch.plain(dropout), [qkv.double()], gradient.double())
    assert_accurate(found, plain, exact, qkv.dtype)
    # The gradients of queries, keys and values are of different sizes: each by itself.
    for part in range(3):
        assert_accurate([found[1][:, part]], [plain[1][:, part]], [exact[1][:, part]], qkv.dtype)
    outside = [*range(int(batch.cu[0])), *range(int(batch.cu[-1]), qkv.shape[0])]
    for tensor in found:
        assert tensor is not None
        assert not tensor[outside].any()


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    device: torch.device, dtype: torch.dtype, dropout: Dropout | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    _check(Batch(device, (1, 15, 16, 17, 0, 31, 32, 33), 2, 32, dtype), dropout)


@pytest.mark.parametrize(
    ("lengths", "heads", "width", "dtype"),
    [
        ((63, 9, 64, 65), 1, 64, torch.bfloat16),
        ((33, 50), 2, 64, torch.float32),
        ((40, 7, 64), 2, 16, torch.float16),
        ((127, 128, 129), 1, 32, torch.bfloat16),
        ((129,), 1, 64, torch.float32),
        ((40, 7, 70), 1, 128, torch.bfloat16),
        ((20, 40), 1, 128, torch.float32),
        ((20, 70), 1, 128, torch.float16),
        ((129, 30), 1, 64, torch.float16),
        ((190,), 1, 16, torch.float16),
    ],
)
def test_accuracy_of_other_sizes(
    device: torch.device,
    lengths: tuple[int, ...],
    heads: int,
    width: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poisoned(monkeypatch)
    _check(Batch(device, lengths, heads, width, dtype), GREATEST)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_accuracy_of_long_rows(
    device: torch.device, dropout: Dropout | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch)
    _check(Batch(device, (512,), 1, 64, torch.bfloat16), dropout)


@pytest.mark.parametrize("all_low", [False, True])
@pytest.mark.parametrize(
    ("dtype", "length"), [(torch.bfloat16, 60), (torch.bfloat16, 100), (torch.float32, 40)]
)
def test_scores_far_apart(device: torch.device, dtype: torch.dtype, length: int, all_low: bool) -> None:
    """Where scores are thousands apart, or below zero, nothing overflows and the weights add up to one."""
    batch = Batch(device, (length,), 1, 32, dtype)
    batch.qkv[:, :2] *= 100
    if all_low:
        batch.qkv[:, 0].abs_()
        batch.qkv[:, 1].abs_().neg_()
    batch.qkv[:, 2] = 1
    output, gradient = batch.results(None)
    assert (output[2:-3] - 1).abs().max() <= torch.finfo(dtype).eps
    assert torch.isfinite(gradient).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about what is not a number
@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [((17, 30, 64, 5), 2, torch.bfloat16), ((9, 130, 3), 1, torch.float16), ((17, 33, 5), 1, torch.float32)],
)
def test_sequences_do_not_leak(
    device: torch.device, lengths: tuple[int, ...], heads: int, dtype: torch.dtype
) -> None:
    batch = Batch(device, lengths, heads, 32, dtype)
    before = batch.results(DROPOUT)
    first, last = int(batch.cu[1]), int(batch.cu[2])
    batch.qkv[first:last] = float("nan")
    batch.gradient[first:last] = float("inf")
    for b, a in zip(before, batch.results(DROPOUT), strict=True):
        assert torch.equal(b[:first], a[:first])
        assert torch.equal(b[last:], a[last:])
        assert a[first:last].isnan().all()  # and what is not a number stays visible


@pytest.mark.parametrize(
    ("longest", "heads", "dtype"), [(30, 2, torch.bfloat16), (130, 1, torch.float16), (30, 1, torch.float32)]
)
def test_tokens_outside_the_sequences_reach_nothing(
    device: torch.device, longest: int, heads: int, dtype: torch.dtype
) -> None:
    batch = Batch(device, (17, longest), heads, 16, dtype, outside=(40, 35))
    clean = batch.results(DROPOUT)
    for tensor in (batch.qkv, batch.gradient):
        tensor[:40] = tensor[-35:] = float("nan")
    assert bit_equal(clean, batch.results(DROPOUT))
    assert not torch.cat([clean[0][:40], clean[0][-35:]]).any()
    assert not torch.cat([clean[1][:40], clean[1][-35:]]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_rest_of_the_batch(device: torch.device, dtype: torch.dtype) -> None:
    """Neither on a second run nor on max_seqlen, which a longer sequence would raise."""
    batch = Batch(device, (40, 20), 1, 32, dtype)
    once = batch.results(DROPOUT)
    assert bit_equal(once, batch.results(DROPOUT))
    assert bit_equal(once, batch.results(DROPOUT, longest=160))


@pytest.mark.parametrize(
    ("lengths", "longest", "heads", "dtype"),
    [
        ((9, 40, 5), 32, 2, torch.bfloat16),
        ((9, 33, 5), 20, 1, torch.bfloat16),
        ((9, 140, 5), 130, 1, torch.bfloat16),
        ((9, 40, 5), 20, 1, torch.float32),
    ],
)
def test_a_sequence_longer_than_promised_is_not_a_number(
    device: torch.device,
    lengths: tuple[int, ...],
    longest: int,
    heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = Batch(device, lengths, heads, 16, dtype)
    expected = batch.results(DROPOUT)
    # What nobody writes is a number here.
    empty_like, new_empty = torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(7))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: new_empty(self, *a, **k).fill_(7))
    last = 11 + lengths[1]
    for e, f in zip(expected, batch.results(DROPOUT, longest), strict=True):
        assert f[11:last].isnan().all()
        assert torch.equal(e[:11], f[:11])
        assert torch.equal(e[last:], f[last:])


@pytest.mark.parametrize(
    ("length", "dtype"), [(20, torch.bfloat16), (20, torch.float32), (100, torch.float16)]
)
def test_a_step_on_the_device_is_the_step(device: torch.device, length: int, dtype: torch.dtype) -> None:
    batch = Batch(device, (length,), 1, 16, dtype)
    step = 2**32 - 5
    there = Dropout(p=0.1, seed=3, step=torch.tensor(step, device=device), site=4)
    here = Dropout(p=0.1, seed=3, step=step, site=4)
    assert bit_equal(batch.results(there), batch.results(here))


def test_a_gradient_that_is_not_contiguous(device: torch.device) -> None:
    batch = Batch(device, (9, 4), 2, 32, torch.bfloat16)
    contiguous = gradients(batch.call(DROPOUT), [batch.qkv], batch.gradient)
    strided = batch.gradient.transpose(1, 2).contiguous().transpose(1, 2)
    assert bit_equal(contiguous, gradients(batch.call(DROPOUT), [batch.qkv], strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_at_all(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    rows = torch.zeros(5, dtype=torch.int32, device=device)
    for tokens, cu in ((0, [0]), (0, [0, 0]), (5, [3]), (5, [2, 2]), (5, [5, 5, 5])):
        qkv = torch.full((tokens, 3, 2, 32), float("nan"), dtype=dtype, device=device, requires_grad=True)
        bounds = torch.tensor(cu, dtype=torch.int32, device=device)
        output = attention(qkv, bounds, 64, scale=1.0, dropout_row=rows[:tokens], dropout=DROPOUT)
        output.backward(torch.full_like(output, float("nan")))
        assert output.shape == (tokens, 2, 32)
        assert not output.any()
        assert not qkv.grad.any()


@pytest.mark.parametrize(("longest", "dtype"), [(20, torch.bfloat16), (20, torch.float32)])
def test_the_operators_keep_torch_s_rules(device: torch.device, longest: int, dtype: torch.dtype) -> None:
    batch = Batch(device, (3, longest), 1, 16, dtype, outside=(0, 0))
    mask = mask_arguments(DROPOUT)
    arguments = (batch.qkv.requires_grad_(), batch.cu, batch.rows, longest, 0.2, *mask)
    torch.library.opcheck(operation._forward, arguments)
    saved = operation._forward(*arguments) if dtype == torch.float32 else (None, None)
    saved = [None if s is None else s.detach() for s in saved]
    torch.library.opcheck(
        operation._backward,
        (batch.gradient, batch.qkv.detach(), *saved, batch.cu, batch.rows, longest, 0.2, *mask),
    )


def test_compiles_without_a_break(device: torch.device) -> None:
    batch = Batch(device, (9, 20), 1, 16, torch.bfloat16)
    compiled = torch.compile(batch.call(DROPOUT), fullgraph=True, backend="aot_eager")
    assert bit_equal(gradients(compiled, [batch.qkv], batch.gradient), batch.results(DROPOUT))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(6, 3, 32, 2).transpose(2, 3)}, "qkv must be contiguous"),
        ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be of dtype int32"),
        ({"max_seqlen": 0}, "max_seqlen must be at least 1"),
        ({"max_seqlen": 4097}, "at most 4096 tokens"),
        ({"qkv": torch.zeros(6, 3, 2, 48)}, "the head dimension must be 16, 32, 64 or 128"),
        ({"qkv": torch.zeros(6, 3, 2, 32, dtype=torch.float64)}, "the dtype must be float32"),
        ({"dropout": DROPOUT}, "dropout_row must be given"),
    ],
)
def test_errors_name_the_argument(device: torch.device, change: dict[str, object], message: str) -> None:
    arguments = {
        "qkv": torch.zeros(6, 3, 2, 32),
        "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32),
        "max_seqlen": 32,
        "scale": 0.2,
    } | change
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises((ValueError, ConfigError), match=message):
        attention(**arguments)  # type: ignore[arg-type]


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("takes a GPU's memory")
    tokens, heads, width = 940_000, 12, 64
    assert tokens * 3 * heads * width > 2**31
    torch.manual_seed(0)
    tail = Batch(device, (60, 200), heads, width, torch.bfloat16, outside=(0, 0))
    qkv = torch.zeros(tokens, 3, heads, width, dtype=torch.bfloat16, device=device)
    gradient = torch.zeros(tokens, heads, width, dtype=torch.bfloat16, device=device)
    rows = torch.zeros(tokens, dtype=torch.int32, device=device)
    for whole, part in ((qkv, tail.qkv), (gradient, tail.gradient), (rows, tail.rows)):
        whole[-260:] = part
    expected = tail.results(DROPOUT)
    tail.cu, tail.rows = tail.cu + (tokens - 260), rows
    for e, f in zip(expected, gradients(tail.call(DROPOUT), [qkv], gradient), strict=True):
        assert torch.equal(e, f[-260:])

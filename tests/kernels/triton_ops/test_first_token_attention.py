"""First tokens' attention by the Triton kernels: accuracy, isolation of rows, determinism, an operator's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, gradients, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout, first_token_attention, reference
from mtbert.kernels.triton_ops import first_token_attention as operation
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
        tokens, rows = int(cu[-1]) + after, len(lengths)
        torch.manual_seed(tokens + width)
        self.cu = cu.to(torch.int32).to(device)
        self.longest = max(lengths)
        self.query = torch.randn(rows, heads, width).to(dtype).to(device)
        self.key_value = torch.randn(tokens, 2, heads, width).to(dtype).to(device)
        self.gradient = torch.randn(rows, heads, width).to(dtype).to(device)
        self.rows = torch.randint(-(2**31), 2**31 - 1, (rows,), dtype=torch.int32).to(device)
        self.scale = width**-0.5

    @property
    def inputs(self) -> list[Tensor]:
        return [self.query, self.key_value]

    def call(self, dropout: Dropout | None, longest: int | None = None) -> Callable[..., Tensor]:
        """The operation as a function of query and key_value."""
        options = {"scale": self.scale, "dropout_row": self.rows, "dropout": dropout}
        return lambda query, key_value: first_token_attention(
            query, key_value, self.cu, longest or self.longest, **options
        )

    def plain(self, dropout: Dropout | None) -> Callable[..., Tensor]:
        """The same, every step in the dtype of query, sequence by sequence."""

        def run(query: Tensor, key_value: Tensor) -> Tensor:
            outputs = []
            for n, (first, last) in enumerate(zip(self.cu[:-1].tolist(), self.cu[1:].tolist(), strict=True)):
                if first == last:
                    outputs.append(torch.zeros_like(query[n]) * query[n])
                    continue
                k, v = key_value[first:last].permute(1, 2, 0, 3)
                p = (query[n][:, None] @ k.transpose(1, 2) * self.scale).softmax(-1)
                if dropout is not None:
                    keys = torch.arange(last - first, device=query.device)
                    columns = torch.cat([h * 4096 + keys for h in range(query.shape[1])])
                    kept = reference.dropout_mask(self.rows[n : n + 1], columns, dropout)
                    p = torch.where(kept.view(p.shape), p * dropout.scale, 0.0)
                outputs.append((p.to(v.dtype) @ v)[:, 0])
            return torch.stack(outputs)

        return run

    def results(self, dropout: Dropout | None, longest: int | None = None) -> list[Tensor | None]:
        """The output and the gradients of query and key_value."""
        return gradients(self.call(dropout, longest), self.inputs, self.gradient)


def _check(batch: Batch, dropout: Dropout | None) -> None:
    found = batch.results(dropout)
    plain = gradients(batch.plain(dropout), batch.inputs, batch.gradient)
    exact = gradients(batch.plain(dropout), [x.double() for x in batch.inputs], batch.gradient.double())
    assert_accurate(found, plain, exact, batch.query.dtype)
    for part in range(2):  # the gradients of keys and values are of different sizes: each by itself
        mine, theirs, true = ([each[2][:, part]] for each in (found, plain, exact))  # type: ignore[index]
        assert_accurate(mine, theirs, true, batch.query.dtype)
    outside = [*range(int(batch.cu[0])), *range(int(batch.cu[-1]), batch.key_value.shape[0])]
    assert not found[2][outside].any()  # type: ignore[index]


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
        ((512,), 1, 64, torch.bfloat16),
        ((511, 1), 1, 32, torch.float32),
        ((127, 128, 129), 1, 64, torch.float32),
        ((9, 127, 33), 1, 64, torch.bfloat16),
        ((63, 64, 65), 2, 16, torch.float16),
        ((40, 7, 70), 1, 128, torch.bfloat16),
        ((40,), 1, 128, torch.float32),
        ((1,), 2, 64, torch.bfloat16),  # the gradient of a query that can only choose one key is exactly 0
        ((0, 1, 9, 0), 2, 32, torch.float32),
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


def test_it_is_the_twin_s_to_rounding(device: torch.device) -> None:
    batch = Batch(device, (5, 0, 40, 129, 1), 2, 32, torch.float32)
    options = {"scale": batch.scale, "dropout_row": batch.rows, "dropout": DROPOUT}
    twin = gradients(
        lambda q, kv: reference.first_token_attention(q, kv, batch.cu, 129, **options),
        batch.inputs,
        batch.gradient,
    )
    for found, expected in zip(batch.results(DROPOUT), twin, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("all_low", [False, True])
def test_scores_far_apart(device: torch.device, all_low: bool) -> None:
    """Where scores are thousands apart, or below zero, nothing overflows and the weights add up to one."""
    batch = Batch(device, (100,), 1, 32, torch.bfloat16)
    batch.query *= 100
    batch.key_value[:, 0] *= 100
    if all_low:
        batch.query.abs_()
        batch.key_value[:, 0].abs_().neg_()
    batch.key_value[:, 1] = 1
    output, *others = batch.results(None)
    assert (output - 1).abs().max() <= torch.finfo(torch.bfloat16).eps  # type: ignore[operator]
    assert all(torch.isfinite(each).all() for each in others if each is not None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about what is not a number
def test_sequences_do_not_leak(device: torch.device) -> None:
    batch = Batch(device, (17, 40, 0, 33, 5), 2, 32, torch.bfloat16)
    before = batch.results(DROPOUT)
    first, last = int(batch.cu[1]), int(batch.cu[2])
    batch.query[1], batch.key_value[first:last] = float("nan"), float("nan")
    batch.gradient[1] = float("inf")
    for index, (b, a) in enumerate(zip(before, batch.results(DROPOUT), strict=True)):
        assert b is not None
        assert a is not None
        start, stop = (first, last) if index == 2 else (1, 2)
        assert torch.equal(b[:start], a[:start])
        assert torch.equal(b[stop:], a[stop:])
        assert a[start:stop].isnan().any()  # and what is not a number stays visible


def test_tokens_outside_the_sequences_reach_nothing(device: torch.device) -> None:
    batch = Batch(device, (17, 40), 2, 16, torch.bfloat16, outside=(40, 75))
    clean = batch.results(DROPOUT)
    batch.key_value[:40] = batch.key_value[-75:] = float("nan")
    assert bit_equal(clean, batch.results(DROPOUT))
    assert not torch.cat([clean[2][:40], clean[2][-75:]]).any()  # type: ignore[index]


def test_bits_do_not_depend_on_a_second_run_nor_on_max_seqlen(device: torch.device) -> None:
    batch = Batch(device, (40, 20), 1, 32, torch.bfloat16)
    once = batch.results(DROPOUT)
    assert bit_equal(once, batch.results(DROPOUT))
    assert bit_equal(once, batch.results(DROPOUT, longest=512))


def test_a_sequence_longer_than_promised_is_not_a_number(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = Batch(device, (9, 40, 5), 2, 16, torch.bfloat16)
    expected = batch.results(DROPOUT)
    poisoned(monkeypatch)
    for index, (e, f) in enumerate(zip(expected, batch.results(DROPOUT, longest=39), strict=True)):
        assert e is not None
        assert f is not None
        first, last = (11, 51) if index == 2 else (1, 2)
        assert f[first:last].isnan().all()
        assert torch.equal(e[:first], f[:first])
        assert torch.equal(e[last:], f[last:])


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    batch = Batch(device, (20, 33), 1, 16, torch.bfloat16)
    step = 2**32 - 5
    there = Dropout(p=0.1, seed=3, step=torch.tensor(step, device=device), site=4)
    here = Dropout(p=0.1, seed=3, step=step, site=4)
    assert bit_equal(batch.results(there), batch.results(here))


def test_nothing_at_all(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch)
    for sequences, tokens in ((0, 0), (0, 4), (2, 0), (2, 5)):
        query = torch.full((sequences, 2, 32), float("nan"), device=device, requires_grad=True)
        key_value = torch.full((tokens, 2, 2, 32), float("nan"), device=device, requires_grad=True)
        bounds = torch.full((sequences + 1,), min(tokens, 3), dtype=torch.int32, device=device)
        rows = torch.zeros(sequences, dtype=torch.int32, device=device)
        output = first_token_attention(
            query, key_value, bounds, 64, scale=1.0, dropout_row=rows, dropout=DROPOUT
        )
        output.backward(torch.full_like(output, 3.0))
        assert output.shape == query.shape
        assert not output.any()
        assert not query.grad.any()  # type: ignore[union-attr]
        assert not key_value.grad.any()  # type: ignore[union-attr]


def test_the_operators_keep_torch_s_rules(device: torch.device) -> None:
    batch = Batch(device, (3, 20), 1, 16, torch.bfloat16, outside=(0, 0))
    mask = mask_arguments(DROPOUT)
    inputs = [x.requires_grad_() for x in batch.inputs]
    arguments = (*inputs, batch.cu, batch.rows, 20, 0.2, *mask)
    # Its check of compiled code takes long: the next test has one of its own.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operation._forward, arguments, test_utils=checks)
    back = (batch.gradient, *(x.detach() for x in inputs), batch.cu, batch.rows, 20, 0.2, *mask)
    torch.library.opcheck(operation._backward, back, test_utils=checks)


def test_compiles_without_a_break(device: torch.device) -> None:
    batch = Batch(device, (9, 20), 1, 16, torch.bfloat16)
    compiled = torch.compile(batch.call(DROPOUT), fullgraph=True, backend="aot_eager")
    assert bit_equal(gradients(compiled, batch.inputs, batch.gradient), batch.results(DROPOUT))


@pytest.mark.parametrize(
    ("width", "dtype", "message"),
    [
        (48, torch.float32, "the head dimension must be 16, 32, 64 or 128"),
        (32, torch.float64, "the dtype must be float32"),
    ],
)
def test_what_it_cannot_serve_is_refused(
    device: torch.device, width: int, dtype: torch.dtype, message: str
) -> None:
    batch = Batch(device, (3,), 1, width, dtype)
    with pytest.raises(ConfigError, match=message):
        batch.call(None)(*batch.inputs)


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("takes a GPU's memory")
    tokens, heads, width = 1_400_000, 12, 64
    assert tokens * 2 * heads * width > 2**31
    tail = Batch(device, (60, 200), heads, width, torch.bfloat16, outside=(0, 0))
    expected = tail.results(DROPOUT)
    key_value = torch.zeros(tokens, 2, heads, width, dtype=torch.bfloat16, device=device)
    key_value[-260:] = tail.key_value
    tail.cu = tail.cu + (tokens - 260)
    found = gradients(tail.call(DROPOUT), [tail.query, key_value], tail.gradient)
    assert torch.equal(found[2][-260:], expected[2])  # type: ignore[index]
    assert not found[2][:-260].any()  # type: ignore[index]
    assert bit_equal(found[:2], expected[:2])

"""Embeddings by the Triton kernels: accuracy, groups, slots, long runs, bad indices, and the operators' rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.kernel_checks import DROPOUT, assert_accurate, bit_equal, poisoned
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.kernels import Dropout, Segments, dispatch, embedding, reference
from mtbert.kernels.segments import companion
from mtbert.kernels.triton_ops import embedding as operation
from mtbert.kernels.triton_ops.embedding_backward import embedding_backward
from mtbert.kernels.triton_ops.launch import launch, mask_arguments, recorded
from mtbert.kernels.triton_ops.table_gradient import table_gradient, table_keys_kernel

NAMES = ("word", "position", "token_type", "weight", "bias")
EPS = 1e-12
WORDS, POSITIONS, TYPES = 23, 19, 2


@dataclass(frozen=True)
class Case:
    """Random inputs of one call; parameters in the order of NAMES."""

    ids: Tensor
    types: Tensor
    positions: Tensor
    rows: Tensor
    parameters: list[Tensor]
    upstream: Tensor
    dropout: Dropout | None = DROPOUT
    slots: Tensor | None = None
    bounds: tuple[int, ...] | None = None
    grouped: Collection[str] = field(default=NAMES)
    """Whose gradients are by group, where there are bounds."""
    frozen: Collection[str] = ()

    def wide(self) -> Case:
        """The same in float64."""
        return replace(
            self, parameters=[p.double() for p in self.parameters], upstream=self.upstream.double()
        )

    def run(self) -> list[Tensor | None]:
        """The output and the gradient of each parameter, or of its companion."""
        parameters = [
            p.clone().requires_grad_(n not in self.frozen)
            for n, p in zip(NAMES, self.parameters, strict=True)
        ]
        segments = self.segments(parameters)
        output = self.call(parameters, segments)
        if output.requires_grad:
            output.backward(self.upstream)
        taken = [p if segments is None else segments.companions.get(p, p) for p in parameters]
        for parameter, taker, given in zip(parameters, taken, self.parameters, strict=True):
            assert taker is parameter or parameter.grad is None
            assert taker.grad is None or (taker.grad.dtype == given.dtype and taker.grad.is_contiguous())
        return [output.detach(), *(t.grad for t in taken)]

    def call(self, parameters: Sequence[Tensor], segments: Segments | None) -> Tensor:
        words, positions, types, weight, bias = parameters
        return embedding(
            self.ids,
            self.types,
            self.positions,
            (words, positions, types),
            weight,
            bias,
            eps=EPS,
            dtype=self.upstream.dtype,
            dropout_row=self.rows,
            dropout=self.dropout,
            segments=segments,
        )

    def segments(self, parameters: Sequence[Tensor]) -> Segments | None:
        if self.bounds is None:
            return None
        takers = {}
        for name, parameter in zip(NAMES, parameters, strict=True):
            if name in self.grouped:
                in_use = parameter.detach()
                if name == "word" and self.slots is not None:
                    in_use = in_use[: int(self.slots.max()) + 1]
                takers[parameter] = companion(in_use, len(self.bounds) - 1)
        return Segments(self.bounds, takers, self.slots)

    def plain(self) -> list[Tensor | None]:
        """PyTorch's own operations, step by step in the output's dtype: what `run` is to give."""
        dtype = self.upstream.dtype
        leaves = [p.clone().requires_grad_() for p in self.parameters]
        words, positions, types, weight, bias = leaves
        total = words[self.ids] + positions[self.positions] + types[self.types]
        total = total if dtype == torch.float64 else total.to(dtype)
        output = F.layer_norm(total, total.shape[1:], weight.to(total.dtype), bias.to(total.dtype), EPS)
        if self.dropout is not None:
            kept = reference.dropout_mask(
                self.rows, torch.arange(total.shape[1], device=total.device), self.dropout
            )
            output = torch.where(kept, output * self.dropout.scale, 0.0)
        bounds = self.bounds or (0, len(self.ids))
        passes = []
        for low, high in pairwise(bounds):
            own = torch.zeros_like(self.upstream)
            own[low:high] = self.upstream[low:high]
            passes.append(torch.autograd.grad(output, leaves, own, retain_graph=True))
        gradients = [torch.stack(by_group) for by_group in zip(*passes, strict=True)]
        gradients = [
            g if self.bounds is not None and n in self.grouped else g.sum(0)
            for n, g in zip(NAMES, gradients, strict=True)
        ]
        return [output.detach(), *gradients]

    def check(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        plain, exact = self.plain(), self.wide().plain()
        if monkeypatch is not None:
            poisoned(monkeypatch)
        assert_accurate(self.run(), plain, exact, self.upstream.dtype)


def case(
    device: torch.device,
    tokens: int = 33,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Case:
    torch.manual_seed(tokens)
    ids = torch.randint(WORDS, (tokens,), dtype=torch.int32)
    count = torch.arange(tokens, dtype=torch.int32)
    sizes = ((WORDS, width), (POSITIONS, width), (TYPES, width), (width,), (width,))
    parameters = [torch.randn(size).to(table_dtype if len(size) == 2 else torch.float32) for size in sizes]
    return Case(
        ids.to(device),
        (count // 3 % TYPES).to(device),
        (count % POSITIONS).to(device),
        (count * 4096 + 5).to(device),
        [p.to(device) for p in parameters],
        torch.randn(tokens, width).to(dtype).to(device),
        **more,
    )


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    [
        (torch.float32, None),
        (torch.float32, DROPOUT),
        (torch.bfloat16, DROPOUT),
        (torch.float16, None),
        (torch.float16, DROPOUT),
    ],
)
@pytest.mark.parametrize(("width", "tokens"), [(20, 31), (384, 9)])
def test_accuracy(
    device: torch.device,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    dropout: Dropout | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case(device, tokens, width, dtype, dropout=dropout).check(monkeypatch)


@pytest.mark.parametrize(("width", "dtype"), [(768, torch.bfloat16), (1024, torch.float32)])
def test_wide_rows(device: torch.device, width: int, dtype: torch.dtype) -> None:
    case(device, 5, width, dtype).check()


def test_one_column(device: torch.device) -> None:
    """All variance is zero, so that only the bias remains."""
    case(device, 5, 1, dropout=None).check()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 127, 128, 129, 512])
def test_numbers_of_tokens(device: torch.device, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case(device, tokens, 24).check(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_in_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    case(device, 33, 40, dtype, table_dtype=torch.bfloat16).check()


@pytest.mark.parametrize("kinds", [1, 3])
def test_numbers_of_types(device: torch.device, kinds: int) -> None:
    made = case(device, 33, 16)
    made.parameters[2] = torch.randn(kinds, 16, device=device)
    replace(made, types=torch.arange(33, dtype=torch.int32, device=device) % kinds).check()
    replace(made, types=torch.arange(33, dtype=torch.int32, device=device) % kinds, bounds=(0, 7, 33)).check()


def test_sums_far_from_zero(device: torch.device) -> None:
    """A large mean does not eat the variance."""
    made = case(device, 9, 384, dropout=None)
    made.parameters[0] += 1000
    exact = made.wide().plain()
    for found, wanted in zip(made.run(), exact, strict=True):
        assert (found.double() - wanted).abs().max() < 1e-3 * wanted.abs().max()  # type: ignore[union-attr]


# ---- groups ----

BOUNDS = [(0, 40), (0, 5, 6, 40), (0, 0, 33, 33, 40, 40)]
"""One group; three; empty ones in front, between and behind."""


@pytest.mark.parametrize(
    ("bounds", "dtype"), [*((bounds, torch.float32) for bounds in BOUNDS), (BOUNDS[1], torch.bfloat16)]
)
def test_each_group_gets_its_own_gradient(
    device: torch.device, bounds: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case(device, 40, 24, dtype, bounds=bounds).check(monkeypatch)


def test_one_group_changes_no_bit(device: torch.device) -> None:
    made = case(device, 40)
    usual = made.run()
    one = replace(made, bounds=(0, 40)).run()
    assert bit_equal(usual, [one[0], *(g[0] for g in one[1:])])  # type: ignore[index]
    assert bit_equal(usual, replace(made, bounds=(0, 7, 40), grouped=()).run())


def test_several_programs_for_each_group(device: torch.device) -> None:
    """And twice the same bits."""
    made = case(device, 200, 24, bounds=(0, 77, 200))
    made.check()
    assert bit_equal(made.run(), made.run())


@pytest.mark.parametrize(
    "grouped", [("word",), ("position", "weight"), ("token_type",), ("weight",), ("bias",)]
)
def test_some_parameters_by_group_and_the_others_not(device: torch.device, grouped: tuple[str, ...]) -> None:
    made = case(device, 40, bounds=BOUNDS[1])
    replace(made, grouped=grouped).check()
    replace(made, grouped=[n for n in NAMES if n not in grouped]).check()


def test_as_the_reference_twin_by_slot(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word table's companion has a row for each slot; slots in the order of appearance, not of the words."""
    made = case(device, 40, bounds=BOUNDS[1])
    order = list(dict.fromkeys(made.ids.tolist()))
    slots = torch.tensor([order.index(i) for i in made.ids.tolist()], dtype=torch.int32, device=device)
    made = replace(made, slots=slots)
    with dispatch.use_backend("reference"):
        plain, exact = made.run(), made.wide().run()
    poisoned(monkeypatch)
    found = made.run()
    assert found[1] is not None
    assert found[1].shape == (3, len(order), 24)
    assert_accurate(found, plain, exact, torch.float32)
    # Slots are the companion's alone.
    usual = replace(made, grouped=[n for n in NAMES if n != "word"])
    assert torch.equal(usual.run()[1], replace(made, bounds=None, slots=None).run()[1])  # type: ignore[arg-type]


def test_a_slot_outside_takes_nothing(device: torch.device) -> None:
    made = case(device, 40, bounds=BOUNDS[1])
    slots = torch.arange(40, dtype=torch.int32, device=device) % 11
    whole = replace(made, slots=slots).run()[1]
    spoiled = torch.where(slots == 3, -1, slots)
    spoiled[4] = 99
    parameters = [p.clone().requires_grad_() for p in made.parameters]
    segments = replace(made, slots=slots).segments(parameters)
    assert segments is not None
    outside = Segments(segments.bounds, segments.companions, spoiled)
    made.call(parameters, outside).backward(made.upstream)
    found = segments.companions[parameters[0]].grad
    assert found is not None
    assert whole is not None
    others = [s for s in range(11) if s not in (3, 4)]
    assert torch.allclose(found[:, others], whole[:, others], atol=1e-5)
    assert not found[:, 3].any()


# ---- what is computed ----


@pytest.mark.parametrize(
    ("trained", "kernels"),
    [
        (("bias",), ["embedding_backward_kernel", "add_partials_kernel"]),
        (("weight", "bias"), ["embedding_backward_kernel", "add_partials_kernel"]),
        (("token_type",), ["embedding_backward_kernel", "add_partials_kernel"]),
        (
            ("position",),
            ["embedding_backward_kernel", "table_keys_kernel", "run_sums_kernel", "join_parts_kernel"],
        ),
    ],
)
def test_frozen_parameters_get_no_gradient_and_change_no_other(
    device: torch.device, trained: tuple[str, ...], kernels: list[str]
) -> None:
    made = case(device, 40)
    everything = made.run()
    frozen = [n for n in NAMES if n not in trained]
    some = replace(made, frozen=frozen).run()
    for name, all_of_it, found in zip(("output", *NAMES), everything, some, strict=True):
        assert found is None if name in frozen else torch.equal(found, all_of_it)  # type: ignore[arg-type]
    with recorded() as launches:
        replace(made, frozen=frozen).run()
    assert [entry.kernel.fn.__name__ for entry in launches[1:]] == kernels
    inner = launches[1].arguments
    assert (inner[12] is not None) == (trained == ("position",))  # the tokens' gradients


def test_all_frozen(device: torch.device) -> None:
    made = case(device, 40)
    assert torch.equal(replace(made, frozen=NAMES).run()[0], made.run()[0])  # type: ignore[arg-type]


# ---- the tables' gradients ----


def _expected(dtotal: Tensor, index: Tensor, bounds: Sequence[int], rows: int) -> Tensor:
    out = dtotal.new_zeros(len(bounds) - 1, rows, dtotal.shape[1], dtype=torch.float64)
    for group, (low, high) in enumerate(pairwise(bounds)):
        own = [t for t in range(low, high) if 0 <= int(index[t]) < rows]
        out[group].index_add_(0, index[own].long(), dtotal[own].double())
    return out


@pytest.mark.parametrize(
    ("tokens", "columns", "bounds"),
    [
        (31, 130, (0, 31)),  # less than a chunk, more than a block of columns
        (32, 8, (0, 32)),
        (96, 8, (0, 96)),
        (200, 8, (0, 20, 20, 64, 90, 200)),  # groups that end within chunks, and at one's end
    ],
)
@pytest.mark.parametrize("frequent", [0.0, 0.6])
def test_rows_are_summed_by_their_index(
    device: torch.device,
    tokens: int,
    columns: int,
    bounds: tuple[int, ...],
    frequent: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Runs within a chunk, over two, and over many; some indices are in no row of the table."""
    torch.manual_seed(tokens)
    index = torch.randint(-1, 14, (tokens,), dtype=torch.int32)
    index[torch.rand(tokens) < frequent] = 7
    dtotal = torch.randn(tokens, columns)
    expected = _expected(dtotal, index, bounds, 13)
    on_device = None if len(bounds) == 2 else torch.tensor(bounds, dtype=torch.int32, device=device)
    poisoned(monkeypatch)
    arguments = (dtotal.to(device), index.to(device), on_device, len(bounds) - 1, 13)
    found = table_gradient(*arguments, torch.float32)
    assert (found.cpu().double() - expected).abs().max() < 1e-5
    assert torch.equal(found.bfloat16(), table_gradient(*arguments, torch.bfloat16))


def test_a_run_of_more_parts_than_are_joined_at_once(device: torch.device) -> None:
    index = torch.full((1500,), 7, dtype=torch.int32)
    index[:40] = 3
    dtotal = torch.randn(1500, 2)
    found = table_gradient(dtotal.to(device), index.to(device), None, 1, 9, torch.float32)
    assert (found.cpu().double() - _expected(dtotal, index, (0, 1500), 9)).abs().max() < 1e-4


def test_nan_stays_in_its_row_of_the_table(device: torch.device) -> None:
    index = torch.arange(100, dtype=torch.int32, device=device) % 3
    dtotal = torch.randn(100, 8, device=device)
    clean = table_gradient(dtotal, index, None, 1, 5, torch.float32)
    dtotal[40] = float("nan")
    found = table_gradient(dtotal, index, None, 1, 5, torch.float32)
    assert found[0, 1].isnan().all()
    assert torch.equal(found[0, [0, 2, 3, 4]], clean[0, [0, 2, 3, 4]])


def test_keys_of_many_groups_of_a_large_table(device: torch.device) -> None:
    """More than 2**31 rows in all: keys of 64 bits."""
    rows = 2**31 - 1
    index = torch.tensor([0, rows - 1, -1, rows - 1, 5], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, 2, 3, 5], dtype=torch.int32, device=device)
    keys = torch.empty(5, dtype=torch.int64, device=device)
    launch(table_keys_kernel, (1,), index, bounds, keys, 5, 3, rows, BLOCK=16)
    assert keys.tolist() == [0, rows - 1, 3 * rows, 3 * rows - 1, 2 * rows + 5]


# ---- indices outside their tables ----


@pytest.mark.parametrize(
    ("argument", "bad"),
    [("ids", WORDS), ("ids", -(2**31)), ("positions", POSITIONS), ("types", TYPES)],
)
def test_an_index_outside_its_table_is_seen_and_read_nowhere(
    device: torch.device, argument: str, bad: int
) -> None:
    made = case(device, 40, dropout=None)
    clean = made.run()
    index = getattr(made, argument).clone()
    index[11] = bad
    found = replace(made, **{argument: index}).run()
    others = [t for t in range(40) if t != 11]
    assert found[0] is not None
    assert found[0][11].isnan().all()
    assert torch.equal(found[0][others], clean[0][others])  # type: ignore[index]
    assert found[4] is not None
    assert found[4].isnan().all()  # the sum over the tokens
    for number, column in ((1, made.ids), (2, made.positions)):
        table, usual = found[number], clean[number]
        assert table is not None
        assert usual is not None
        rows = [r for r in range(len(table)) if r != int(column[11])]
        # A token less among the sorted ones: the others are added in other pairs.
        assert torch.allclose(table[rows], usual[rows], atol=1e-5)
        used = {1: "ids", 2: "positions"}[number]
        assert argument == used or table[int(column[11])].isnan().all()


# ---- the rest ----


def test_tokens_do_not_see_each_other(device: torch.device) -> None:
    made = case(device, 40)
    ids, upstream = made.ids.clone(), made.upstream.clone()
    ids[11] = (ids[11] + 1) % WORDS
    upstream[11] = float("nan")
    changed = replace(made, ids=ids, upstream=upstream, dropout=None)
    before, after = replace(made, dropout=None).run(), changed.run()
    others = [t for t in range(40) if t != 11]
    assert torch.equal(before[0][others], after[0][others])  # type: ignore[index]
    touched = {int(made.ids[11]), int(ids[11])}
    rows = [r for r in range(WORDS) if r not in touched]
    assert torch.allclose(before[1][rows], after[1][rows], atol=1e-5)  # type: ignore[index]


def test_what_is_dropped_takes_no_part(device: torch.device) -> None:
    made = case(device, 17)
    kept = reference.dropout_mask(made.rows, torch.arange(24, device=device), DROPOUT)
    spoiled = replace(made, upstream=made.upstream.masked_fill(~kept, float("nan")))
    assert bit_equal(made.run(), spoiled.run())


def test_a_step_on_the_device_is_the_step(device: torch.device) -> None:
    there = Dropout(DROPOUT.p, DROPOUT.seed, torch.tensor(2**32 - 1, device=device), DROPOUT.site)
    here = Dropout(DROPOUT.p, DROPOUT.seed, 2**32 - 1, DROPOUT.site)
    made = case(device, 17)
    assert bit_equal(replace(made, dropout=here).run(), replace(made, dropout=there).run())


def test_nothing_at_all(device: torch.device) -> None:
    for bounds in (None, (0, 0, 0)):
        made = case(device, 0, bounds=bounds)
        output, *found = made.run()
        assert output is not None
        assert output.shape == (0, 24)
        for gradient, parameter in zip(found, made.parameters, strict=True):
            assert gradient is not None
            assert gradient.shape[-parameter.ndim :] == parameter.shape
            assert not gradient.any()


def test_the_operators_keep_torch_s_rules(device: torch.device) -> None:
    made = case(device, 9, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)
    slots = torch.arange(9, dtype=torch.int32, device=device) % 4
    indices = (made.ids, made.types, made.positions)
    mask, step = mask_arguments(DROPOUT)
    takers = [companion(p[:4] if n == 0 else p, 2).detach() for n, p in enumerate(made.parameters)]
    usual = (*(p.requires_grad_() for p in made.parameters), *[None] * 5, None, 1, None)
    grouped = (
        *(p.detach() for p in made.parameters),
        *(t.requires_grad_() for t in takers),
        bounds,
        2,
        slots,
    )
    cheap = ("test_schema", "test_autograd_registration", "test_faketensor")
    for tensors, tests in ((usual, cheap), (grouped, (*cheap, "test_aot_dispatch_dynamic"))):
        arguments = (*indices, *tensors, EPS, torch.float32, made.rows, mask, step)
        torch.library.opcheck(operation._embedding, arguments, test_utils=tests)
    words, positions, types, weight, _ = (p.detach() for p in made.parameters)
    _, mean, rstd = (t.detach() for t in operation._embedding(*arguments))
    saved = (*indices, slots, words, positions, types, weight, mean, rstd, made.rows, mask, step, bounds)
    for needs in ([2] * 5, [0, 1, 2, 0, 1]):
        arguments = (made.upstream, *saved, 2, 4, torch.float32, needs)
        torch.library.opcheck(embedding_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bounds", [None, (0, 4, 9)], ids=["usual", "grouped"])
def test_compiles_into_one_graph(device: torch.device, bounds: tuple[int, ...] | None) -> None:
    made = case(device, 9, 8, bounds=bounds)
    leaves = [p.clone().requires_grad_() for p in made.parameters]
    segments = made.segments(leaves)

    def double(*parameters: Tensor) -> Tensor:
        return 2 * made.call(parameters, segments)

    takers = leaves if segments is None else list(segments.companions.values())
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*leaves), takers, made.upstream)
    assert bit_equal(found, torch.autograd.grad(double(*leaves), takers, made.upstream))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(40, dtype=torch.int64)}, "ids must be of dtype int32"),
        ({"types": torch.zeros(39, dtype=torch.int32)}, r"type_ids must be of shape \[40\]"),
        ({"positions": torch.zeros(80, dtype=torch.int32)[::2]}, "positions must be contiguous"),
        ({"rows": torch.zeros(40, dtype=torch.int64)}, "dropout_row must be of dtype int32"),
        ({"bounds": (0, 39)}, "segments.bounds must be .* 40"),
    ],
)
def test_what_does_not_fit_is_refused(device: torch.device, change: dict[str, Any], message: str) -> None:
    moved = {n: v if n == "bounds" or not v.is_contiguous() else v.to(device) for n, v in change.items()}
    if device.type == "cuda" and "positions" in change:
        moved = {"positions": torch.zeros(80, dtype=torch.int32, device=device)[::2]}
    with pytest.raises(ValueError, match=f"embedding: {message}"):
        replace(case(device, 40), **moved).run()


@pytest.mark.parametrize(
    ("number", "table", "message"),
    [
        (2, torch.zeros(9, 24), "the token_type table must have at most 8 rows"),
        (None, torch.float16, "the tables' dtype must be float32 or bfloat16"),
    ],
)
def test_what_triton_does_not_serve(
    device: torch.device, number: int | None, table: Any, message: str
) -> None:
    made = case(device, 40)
    if number is None:
        made.parameters[:3] = [p.to(table) for p in made.parameters[:3]]
    else:
        made.parameters[number] = table.to(device)
    with pytest.raises(ConfigError, match=message):
        made.run()

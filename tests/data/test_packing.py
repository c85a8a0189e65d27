from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtbert.data.dataset import TaskData
from mtbert.data.packing import (
    MAX_ROWS,
    Request,
    distinct_rows,
    pack,
    plan_passes,
    plan_shares,
    rounded_length,
)
from mtbert.errors import DataError

FORMS = ("single", "pair-rows", "cross")


@st.composite
def tasks(draw: st.DrawFn, make) -> dict[str, TaskData]:
    """One to four tasks of any form, with some texts longer than their limit."""
    datasets = {}
    for number in range(draw(st.integers(1, 4))):
        form = draw(st.sampled_from(FORMS))
        texts = 1 if form == "single" else 2
        sizes = draw(st.lists(st.tuples(*[st.integers(0, 9)] * texts), min_size=1, max_size=7))
        examples = [
            [[1000 + 100 * number + 10 * t + k for k in range(s)] for t, s in enumerate(row)] for row in sizes
        ]
        labels = draw(st.sampled_from([np.arange(len(sizes)) % 3, np.arange(len(sizes)) / 2, None]))
        datasets[f"task{number}"] = TaskData(
            f"task{number}",
            make(examples, labels),
            form=form,
            max_length=draw(st.integers(5, 14)),
            truncate=draw(st.sampled_from(["head", "tail", "both"])),
        )
    return datasets


@st.composite
def steps(draw: st.DrawFn, make) -> tuple[dict[str, np.ndarray], dict[str, TaskData]]:
    datasets = draw(tasks(make))
    step = {
        name: np.array(draw(st.lists(st.integers(0, len(data) - 1), max_size=8)), dtype=np.int64)
        for name, data in datasets.items()
    }
    return step, datasets


@given(st.data(), st.integers(0, 1000))
def test_every_token_of_every_row(make_tokenised, data: st.DataObject, first_row_id: int) -> None:
    step, datasets = data.draw(steps(make_tokenised))
    requests, row_id = [], first_row_id
    for name, examples in step.items():
        requests.append(Request(datasets[name], examples, row_id, 0.25))
        row_id += len(examples) * datasets[name].rows_per_example
    batch = pack(requests)

    rows = [row for r in requests for example in r.examples for row in r.data.rows(example)]
    bounds = np.cumsum([0, *(len(ids) for ids, _ in rows)]).tolist()
    assert batch.cu_seqlens.tolist() == bounds
    assert (batch.rows, batch.tokens) == (len(rows), bounds[-1])
    assert batch.input_ids.tolist() == [token for ids, _ in rows for token in ids.tolist()]
    assert batch.token_type_ids.tolist() == [kind for _, kinds in rows for kind in kinds.tolist()]
    assert batch.position_ids.tolist() == [place for ids, _ in rows for place in range(len(ids))]
    assert batch.dropout_row.tolist() == [
        (first_row_id + number) * 4096 + place
        for number, (ids, _) in enumerate(rows)
        for place in range(len(ids))
    ]
    for tensor in (
        batch.input_ids,
        batch.token_type_ids,
        batch.position_ids,
        batch.dropout_row,
        batch.cu_seqlens,
    ):
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()
    assert batch.max_seqlen == rounded_length(max((len(ids) for ids, _ in rows), default=1))

    row = 0
    for request, segment in zip(requests, batch.segments, strict=True):
        task, examples = request.data, request.examples
        assert segment.task == task.name
        assert segment.rows == range(row, row + len(examples) * task.rows_per_example)
        assert segment.tokens == range(bounds[segment.rows.start], bounds[segment.rows.stop])
        assert segment.examples.tolist() == examples.tolist()
        assert segment.ids == tuple(task.ids[example] for example in examples)
        assert segment.rows_per_example == task.rows_per_example
        assert segment.weights.dtype == torch.float64
        if task.labels is None:
            assert segment.labels.tolist() == [0] * len(examples)
            assert segment.weights.tolist() == [0] * len(examples)
        else:
            assert segment.labels.tolist() == task.labels[examples].tolist()
            assert segment.labels.dtype == (torch.int64 if task.labels.dtype == np.int64 else torch.float64)
            assert segment.weights.tolist() == [0.25] * len(examples)
        row = segment.rows.stop


@settings(max_examples=200)
@given(st.data(), st.integers(0, 60))
def test_passes_are_the_step(make_tokenised, data: st.DataObject, slack: int) -> None:
    step, datasets = data.draw(steps(make_tokenised))
    lengths = [int(datasets[name].lengths[e]) for name, examples in step.items() for e in examples]
    budget = max(lengths, default=1) + slack
    passes = plan_passes(step, datasets, budget)
    batches = [pack(requests) for requests in passes]
    whole = pack([request for requests in plan_passes(step, datasets, 10**9) for request in requests])

    # Each pass fits; together, in order, they are the whole step in one pass, row ids and weights included.
    assert all(0 < batch.tokens <= budget for batch in batches)
    for name in ("input_ids", "token_type_ids", "position_ids", "dropout_row"):
        parts = [getattr(batch, name) for batch in batches]
        assert torch.equal(
            torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32), getattr(whole, name)
        )
    segments = [segment for batch in batches for segment in batch.segments]
    for name, examples in step.items():
        mine = [segment for segment in segments if segment.task == name]
        assert [e for segment in mine for e in segment.examples.tolist()] == examples.tolist()
        weights = [w for segment in mine for w in segment.weights.tolist()]
        if len(examples) and datasets[name].labels is not None:
            assert sum(weights) == pytest.approx(1, abs=1e-6)
            assert len(set(weights)) == 1
        else:
            assert sum(weights) == 0

    # As few passes as filling them one after the other takes, and none larger than an even split needs.
    fewest, filled = 0, budget + 1
    for length in lengths:
        if filled + length > budget:
            fewest, filled = fewest + 1, 0
        filled += length
    assert len(passes) == fewest
    if passes:
        assert max(batch.tokens for batch in batches) <= sum(lengths) / fewest + max(lengths)


@settings(max_examples=200)
@given(st.data(), st.integers(0, 60), st.integers(1, 5))
def test_shares_are_the_step(make_tokenised, data: st.DataObject, slack: int, ranks: int) -> None:
    step, datasets = data.draw(steps(make_tokenised))
    lengths = [int(datasets[name].lengths[e]) for name, examples in step.items() for e in examples]
    longest = max(lengths, default=1)
    passes = plan_shares(step, datasets, longest + slack, ranks)
    assert all(len(shares) == ranks for shares in passes)
    tokens = [[pack(requests).tokens for requests in shares] for shares in passes]
    assert all(count <= longest + slack for shares in tokens for count in shares)
    assert all(max(shares) - min(shares) <= 2 * longest for shares in tokens)
    # In a pass, each stream goes to the ranks in their order: examples, row ids and weights are those of the step.
    whole = {r.data.name: r for requests in plan_passes(step, datasets, 10**9) for r in requests}
    for name, examples in step.items():
        mine = [r for shares in passes for share in shares for r in share if r.data.name == name]
        assert [e for request in mine for e in request.examples.tolist()] == examples.tolist()
        if not mine:
            continue
        row = whole[name].first_row_id
        for request in mine:
            assert (request.first_row_id, request.weight) == (row, whole[name].weight)
            row += len(request.examples) * request.data.rows_per_example
    assert len(passes) <= len(plan_passes(step, datasets, longest + slack))


def test_shares_of_every_stream_are_even(make_tokenised) -> None:
    chance = np.random.default_rng(0)
    datasets = {
        name: TaskData(
            name,
            make_tokenised([[[7] * n] for n in chance.integers(1, 30, 64)]),
            form="single",
            max_length=64,
        )
        for name in ("a", "b", "c")
    }
    (shares,) = plan_shares({name: np.arange(64) for name in datasets}, datasets, 10**6, 4)
    for name, each in datasets.items():
        parts = [each.lengths[r.examples].sum() for share in shares for r in share if r.data.name == name]
        assert max(parts) - min(parts) <= 64
    totals = [sum(int(r.data.lengths[r.examples].sum()) for r in share) for share in shares]
    assert max(totals) - min(totals) <= 32


def test_passes_are_balanced(make_tokenised) -> None:
    data = TaskData("a", make_tokenised([[[7] * 8]] * 11), form="single", max_length=16)
    passes = plan_passes({"a": np.arange(11)}, {"a": data}, 80)
    assert [[len(request.examples) for request in requests] for requests in passes] == [[6], [5]]
    assert [requests[0].first_row_id for requests in passes] == [0, 6]


def test_example_longer_than_a_pass(make_tokenised) -> None:
    short = TaskData("a", make_tokenised([[[7]]] * 3), form="single", max_length=16)
    long = TaskData("b", make_tokenised([[[7]], [[7] * 9]]), form="single", max_length=16)
    step = {"a": np.array([0, 1]), "b": np.array([0, 1])}
    with pytest.raises(
        DataError, match=r"train\.csv, line 3: the example takes 11 tokens, more than the 10 of"
    ):
        plan_passes(step, {"a": short, "b": long}, 10)


def test_empty_step(make_tokenised) -> None:
    assert plan_passes({}, {}, 100) == []
    batch = pack([])
    assert (batch.tokens, batch.rows, batch.max_seqlen, batch.segments) == (0, 0, 32, ())
    assert batch.cu_seqlens.tolist() == [0]


def test_row_ids_end_where_dropout_rows_do(make_tokenised) -> None:
    data = TaskData("a", make_tokenised([[[7] * 4094]]), form="single", max_length=4096)
    batch = pack([Request(data, np.array([0]), MAX_ROWS - 1, 1.0)])
    assert batch.dropout_row[-1].item() == 2**31 - 1
    with pytest.raises(DataError, match="task a: a step of more than 524288 rows cannot be packed"):
        pack([Request(data, np.array([0]), MAX_ROWS, 1.0)])


def test_rounded_length() -> None:
    lengths = (1, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024, 1025)
    assert [rounded_length(n) for n in lengths] == [
        32,
        32,
        64,
        64,
        128,
        128,
        256,
        256,
        512,
        512,
        1024,
        1024,
        1536,
    ]


def test_moving_a_batch_keeps_everything_else(make_tokenised) -> None:
    data = TaskData("a", make_tokenised([[[7]]], np.array([1])), form="single", max_length=16)
    batch = pack([Request(data, np.array([0]), 0, 1.0)])
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.segments[0].labels.device.type == moved.segments[0].weights.device.type == "meta"
    assert moved.segments[0].ids == batch.segments[0].ids
    assert (moved.tokens, moved.rows, moved.max_seqlen) == (batch.tokens, batch.rows, batch.max_seqlen)
    assert batch.input_ids.device.type == "cpu"


def test_packing_is_fast(make_tokenised) -> None:
    """150 rows of 25 tokens; about 0.3 ms, with room for a busy machine (token by token: 20 ms)."""
    examples = [[[7] * 23]] * 1000
    data = TaskData("a", make_tokenised(examples, np.arange(1000)), form="single", max_length=64)
    step = {"a": np.arange(0, 1000, 7)[:150]}
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        for requests in plan_passes(step, {"a": data}, 10_000):
            pack(requests)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 3e-3


@given(st.data())
def test_distinct_rows_are_the_rows_of_the_table(make_tokenised, data: st.DataObject) -> None:
    for examples in data.draw(tasks(make_tokenised)).values():
        apart, which = distinct_rows(examples)
        whole = pack([Request(examples, np.arange(len(examples)), 0, 1.0)])
        again = pack([Request(apart, which, 0, 1.0)])
        for name in ("input_ids", "token_type_ids", "position_ids", "dropout_row", "cu_seqlens"):
            assert torch.equal(getattr(whole, name), getattr(again, name)), name
        each = [(ids.tobytes(), types.tobytes()) for i in range(len(apart)) for ids, types in apart.rows(i)]
        assert len(set(each)) == len(each)
        assert apart.lengths.tolist() == [len(ids) // 4 for ids, _ in each]
        assert examples.labels is None or len(examples.labels) == len(examples)  # the table is as it was

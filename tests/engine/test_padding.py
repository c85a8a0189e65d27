"""A step that is padded to a fixed shape is the step as it comes: losses, gradients, surgery, in every mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.assembly import Assembly
from support.steps import CASES, configured

from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Request, pack
from mtbert.data.padding import Budgets, StreamBudget, measure_budgets, pad, pad_words
from mtbert.engine.prepared_step import PreparedStep
from mtbert.engine.step_result import StepResult

STEP = 5


def plan_of(assembly: Assembly) -> dict[str, np.ndarray]:
    """A smaller batch of one task, as at the end of its cycle."""
    plan = {name: batches.batch(1) for name, batches in assembly.batches.items()}
    return plan | {"para": plan["para"][:4]}


def budgets_of(assembly: Assembly) -> Budgets:
    train = {name: splits["train"] for name, splits in assembly.data.items()}
    vocabulary = assembly.model.encoder.embeddings.word.shape[0]
    return measure_budgets(assembly.batches, train, vocabulary=vocabulary)


def gradients(assembly: Assembly, ready: PreparedStep) -> tuple[StepResult, dict[str, torch.Tensor]]:
    result = assembly.step.backward(ready)
    named = assembly.model.named_parameters()
    return result, {name: p.grad.clone() for name, p in named if p.grad is not None}


def poisoned(batch: PackedBatch) -> PackedBatch:
    """Whatever fills it up is other words at other places, with labels that are none."""
    generator = torch.Generator().manual_seed(0)
    fields = [batch.input_ids, batch.token_type_ids, batch.position_ids, batch.dropout_row]
    fields = [field.clone() for field in fields]
    segments = []
    for segment in batch.segments:
        real = len(segment.examples) * segment.rows_per_example
        first = int(batch.cu_seqlens[segment.rows.start + real])
        assert first < segment.tokens.stop, "there is filler in every segment"
        for field, most in zip(fields, (40, 2, 60, 2**31 - 1), strict=True):
            field[first : segment.tokens.stop].random_(0, most, generator=generator)
        labels = segment.labels.clone()
        labels[len(segment.examples) :] = float("nan") if labels.is_floating_point() else 2**40
        segments.append(replace(segment, labels=labels))
    ids, types, positions, dropout_row = fields
    return PackedBatch(
        ids, types, positions, dropout_row, batch.cu_seqlens, batch.max_seqlen, tuple(segments)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_padded_step_is_the_step_as_it_comes(tiny_bert: Path, tmp_path: Path, case: str) -> None:
    assembly = configured(tiny_bert, tmp_path, case)
    plan = plan_of(assembly)
    expected, wanted = gradients(assembly, assembly.step.prepare(plan, STEP))
    assembly.step.budgets = budgets_of(assembly)
    ready = assembly.step.prepare(plan, STEP)
    assert ready.shape is not None, ready.unfit
    (one,) = ready.passes
    assert one.batch is not None
    bad = replace(ready, passes=(replace(one, batch=poisoned(one.batch)),))
    if assembly.step.surgery is not None:
        assembly.step.surgery.targets.clear()
    for padded in (ready, bad):
        result, found = gradients(assembly, padded)
        if assembly.step.surgery is not None:
            assembly.step.surgery.targets.clear()
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
        for task, loss in expected.losses.items():
            torch.testing.assert_close(result.losses[task], loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(result.total, expected.total, rtol=1e-10, atol=1e-12)
        assert result.tokens == expected.tokens
        for (_, mine), (segment, theirs) in zip(result.examples, expected.examples, strict=True):
            torch.testing.assert_close(mine[: len(segment.examples)], theirs, rtol=1e-10, atol=1e-12)
            assert torch.isfinite(mine).all()
        if expected.gradients is not None:
            assert result.gradients is not None
            torch.testing.assert_close(result.gradients.gram, expected.gradients.gram, rtol=1e-9, atol=1e-12)
            assert torch.equal(result.gradients.combined.altered, expected.gradients.combined.altered)


@pytest.mark.parametrize("case", ["summed", "one pass", "a pass a task"])
def test_words_that_no_example_holds_need_not_be_finite(tiny_bert: Path, tmp_path: Path, case: str) -> None:
    assembly = configured(tiny_bert, tmp_path, case)
    plan = plan_of(assembly)
    requests = [Request(assembly.step.data[name], rows, 0, 1.0) for name, rows in plan.items()]
    embeddings, batch = assembly.model.encoder.embeddings, pack(requests)
    with torch.no_grad():
        for table, held in (
            (embeddings.word, batch.input_ids),
            (embeddings.position, batch.position_ids),
            (embeddings.token_type, batch.token_type_ids),
        ):
            unread = torch.ones(len(table), dtype=torch.bool)
            unread[held.long()] = False
            table[unread] = float("inf")
    assert torch.isinf(embeddings.word[0]).all(), "[PAD]"
    expected, wanted = gradients(assembly, assembly.step.prepare(plan, STEP))
    assembly.step.budgets = budgets_of(assembly)
    ready = assembly.step.prepare(plan, STEP)
    assert ready.shape is not None, ready.unfit
    result, found = gradients(assembly, ready)
    assert bool(expected.finite)
    assert bool(result.finite)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_steps_of_full_and_of_smaller_batches_have_one_shape(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "one pass")
    assembly.step.budgets = budgets_of(assembly)
    shapes, sizes = set(), set()
    for step in range(40):
        plan = {name: batches.batch(step) for name, batches in assembly.batches.items()}
        ready = assembly.step.prepare(plan, step)
        assert ready.shape is not None, ready.unfit
        (one,) = ready.passes
        assert one.batch is not None
        assert ready.words is not None
        assert len(ready.words.unique()) == len(ready.words)
        sizes.add((one.batch.tokens, one.batch.rows, len(ready.words), one.batch.max_seqlen))
        shapes.add(ready.shape)
    assert len(shapes) == len(sizes) == len({shape.max_seqlen for shape in shapes}) <= 2


def test_what_does_not_fit_is_taken_as_it_comes_with_a_reason(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "one pass")
    plan = plan_of(assembly)
    plain = assembly.step.prepare(plan, 0)
    fits = budgets_of(assembly)
    sst = fits.streams["sst"]
    cases = {
        "more examples of sst": replace(fits, streams={**fits.streams, "sst": replace(sst, examples=5)}),
        "more tokens of sst": replace(fits, streams={**fits.streams, "sst": replace(sst, tokens=8)}),
        "fewer tokens of sst": replace(fits, streams={**fits.streams, "sst": replace(sst, tokens=10**4)}),
        "more words": replace(fits, words=3),
        "sst has no budget": replace(fits, streams={"para": fits.streams["para"]}),
    }
    for reason, budgets in cases.items():
        assembly.step.budgets = budgets
        ready = assembly.step.prepare(plan, 0)
        assert ready.shape is None
        assert ready.unfit.startswith(reason)
        batch, expected = ready.passes[0].batch, plain.passes[0].batch
        assert batch is not None
        assert expected is not None
        assert torch.equal(batch.input_ids, expected.input_ids)
    assembly.step.budgets, assembly.step.max_tokens = fits, 128
    assert assembly.step.prepare(plan, 0).unfit == "the step takes several passes (max_tokens)"


def test_filler_closes_each_segment(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = configured(tiny_bert, tmp_path, "summed")
    data: dict[str, TaskData] = {name: splits["train"] for name, splits in assembly.data.items()}
    batch = pack([Request(data["sst"], np.arange(3), 0, 1 / 3), Request(data["para"], np.arange(2), 3, 0.5)])
    budgets = Budgets({"sst": StreamBudget(3, 200, 190), "para": StreamBudget(4, 400, 390)})
    shape = budgets.shape_of(batch)
    assert not isinstance(shape, str)
    padded = pad(batch, shape)
    lengths = padded.cu_seqlens.diff()
    assert lengths.max() <= padded.max_seqlen
    assert [len(s.tokens) for s in padded.segments] == [200, 400]
    for before, after in zip(batch.segments, padded.segments, strict=True):
        own = slice(after.tokens.start, after.tokens.start + len(before.tokens))
        assert torch.equal(
            padded.dropout_row[own], batch.dropout_row[before.tokens.start : before.tokens.stop]
        )
        assert int(lengths[after.rows.start : after.rows.stop].sum()) == len(after.tokens)
        assert float(after.weights.sum()) == pytest.approx(1.0)
        assert after.ids == before.ids
        for field, held in (
            (padded.input_ids, batch.input_ids),
            (padded.position_ids, batch.position_ids),
            (padded.token_type_ids, batch.token_type_ids),
            (padded.dropout_row, batch.dropout_row),
        ):
            cycle = held[before.tokens.start : before.tokens.stop]
            again = field[after.tokens.start : after.tokens.stop]
            assert torch.equal(again, cycle.repeat(9)[: len(again)])
    small = replace(shape, streams=(replace(shape.streams[0], tokens=10), shape.streams[1]))
    with pytest.raises(ValueError, match="sst"):
        pad(batch, small)


def test_words_are_filled_up_with_others() -> None:
    assert pad_words(torch.tensor([1, 3, 9]), 6).tolist() == [1, 3, 9, 0, 2, 4]
    assert pad_words(torch.tensor([0, 1]), 2).tolist() == [0, 1]

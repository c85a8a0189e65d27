"""Captured passes of evaluations give what passes as they come give, whatever the weights have become since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from support.steps import configured
from support.tape import TapeRecorder

from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Request, pack
from mtbert.data.padding import PassShape, coarse_shape
from mtbert.engine import graphs, inference_graphs
from mtbert.engine.build import curriculum_of
from mtbert.engine.capture import Recorded
from mtbert.engine.evaluator import EvaluationConfig, Evaluator
from mtbert.engine.finish import predict_split
from mtbert.engine.forward import PackedForward
from mtbert.engine.inference import infer
from mtbert.engine.inference_graphs import InferenceGraphs
from mtbert.errors import ConfigError
from mtbert.kernels import dispatch
from mtbert.kernels.casts import WeightCasts
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import TASKS

MOST_TOKENS = 256
"""Of a pass: a table of the small sample takes several."""


class Repeats:
    """Stands for a graph: a replay does the work again, Python included."""

    def run(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> Recorded:
        result = work()
        return Recorded(result, lambda: result.copy_(work()), done=True)


class Unwilling(Repeats):
    """No capture succeeds."""

    def record(self, work: Callable[[], Any]) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def assembly(tiny_bert: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Assembly]:
    """Float32 weights, with the kernels that the tape can see."""
    with dispatch.use_backend("reference"):
        yield build(tiny_bert, tmp_path, request.param)


def build(tiny_bert: Path, tmp_path: Path, dtype: torch.dtype) -> Assembly:
    config = tiny_config(tiny_bert, tmp_path)
    rows = HeadConfig(pooling="mean", pair=["cosine"])
    config.task["sts"] = TaskConfig(batch_size=6, max_length=64, head=rows)
    return assemble(config, dtype=dtype, rows=24)


def captured(assembly: Assembly, recorder: Any, **options: Any) -> InferenceGraphs:
    forward = assembly.forward
    assert isinstance(forward, PackedForward)
    forward.graphs = InferenceGraphs(forward, recorder, **options)
    return forward.graphs


def plain(assembly: Assembly) -> PackedForward:
    return PackedForward(assembly.model, assembly.forward.device, assembly.forward.dtype)


def tables(assembly: Assembly) -> list[TaskData]:
    """All of them: those of dev have labels, those of test have none."""
    return [
        splits[split] for splits in assembly.data.values() for split in ("dev", "test") if split in splits
    ]


def outputs(forward: Any, data: list[TaskData]) -> list[np.ndarray]:
    return [infer(forward, each, max_tokens=MOST_TOKENS) for each in data]


def train(assembly: Assembly) -> None:
    """One step that moves every weight."""
    for group in assembly.step.optimizer.param_groups:
        group["lr"] = 1e-2
    assembly.step({name: batches.batch(0) for name, batches in assembly.batches.items()}, 0).check()


def test_replays_follow_the_weights(assembly: Assembly) -> None:
    # The twin pads alike; the tape holds no Python, so that whatever was kept from before a capture shows.
    recorder, data = TapeRecorder(), tables(assembly)
    assert any(each.labels is None for each in data)
    captures = captured(assembly, recorder)
    twin = plain(assembly)
    twin.graphs = InferenceGraphs(twin, Repeats(), warm_up=10**6)
    tolerance = 1e-5 if assembly.forward.dtype == torch.float32 else 5e-2
    before: list[np.ndarray] = []
    for _ in range(3):
        found, expected, unpadded = (outputs(f, data) for f in (assembly.forward, twin, plain(assembly)))
        for mine, theirs, as_it_comes in zip(found, expected, unpadded, strict=True):
            assert np.array_equal(mine, theirs)
            np.testing.assert_allclose(mine, as_it_comes, rtol=tolerance, atol=tolerance)
        if before:
            assert all(not np.allclose(a, b, atol=1e-3) for a, b in zip(found, before, strict=True))
        before = found
        train(assembly)
    assert captures.counts.keys() == {"replayed", "warm-up"}
    assert captures.counts["warm-up"] == len(recorder.tapes), "each shape once as it is, then once captured"
    assert captures.counts["replayed"] > len(recorder.tapes)
    # A checkpoint goes to the same memory; a parameter that is replaced is in no graph.
    weights = {name: value + 0.01 for name, value in assembly.model.state_dict().items()}
    assembly.model.load_state_dict(weights)
    for mine, theirs in zip(outputs(assembly.forward, data), outputs(twin, data), strict=True):
        assert np.array_equal(mine, theirs)
    tapes = len(recorder.tapes)
    assert captures.counts["warm-up"] == tapes
    assembly.model.load_state_dict({n: v * 0.99 for n, v in weights.items()}, assign=True)
    for mine, theirs in zip(outputs(assembly.forward, data), outputs(twin, data), strict=True):
        assert np.array_equal(mine, theirs)
    assert captures.counts["warm-up"] > tapes


def test_a_captured_pass_casts_the_weights_itself(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select = dispatch.select

    def with_products(operation: str, **facts: Any) -> tuple[str, str]:
        """The reference, but for products, where it keeps no casts; PyTorch's products are on the tape, too."""
        return ("cpu", "") if operation == "linear" else select(operation, **facts)

    monkeypatch.setattr(dispatch, "select", with_products)
    assembly = build(tiny_bert, tmp_path, torch.bfloat16)
    twin = plain(assembly)
    twin.graphs = InferenceGraphs(twin, Repeats())
    captured(assembly, TapeRecorder(), warm_up=0)
    requests = [Request(assembly.data["sst"]["dev"], np.arange(4), 0, 1.0)]

    def found(*forwards: Any) -> list[torch.Tensor]:
        with torch.inference_mode(), WeightCasts():
            return [forward(requests, None).outputs["sst"] for forward in forwards]

    with dispatch.use_backend("reference"):
        before, *_ = found(plain(assembly), assembly.forward)  # there are casts already when it is captured
        train(assembly)
        (mine,), (theirs,) = found(assembly.forward), found(twin)
    assert torch.equal(mine, theirs)
    assert not torch.allclose(mine, before, atol=1e-3)


def test_whatever_fills_a_pass_changes_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = build(tiny_bert, tmp_path, torch.float32)
    data = tables(assembly)
    captured(assembly, Repeats())
    expected = [outputs(assembly.forward, data) for _ in range(2)][1]
    generator = torch.Generator().manual_seed(0)
    changed = 0

    def poisoned(batch: PackedBatch, shape: PassShape) -> PackedBatch:
        nonlocal changed
        padded = inference_graphs_pad(batch, shape)
        (segment,) = padded.segments
        changed += padded.tokens - batch.tokens
        for field, most in ((padded.input_ids, 40), (padded.token_type_ids, 2), (padded.position_ids, 60)):
            field[batch.tokens :].random_(0, most, generator=generator)
        labels = segment.labels.clone()
        labels[len(segment.examples) :] = 2**40
        return replace(padded, segments=(replace(segment, labels=labels),))

    inference_graphs_pad = inference_graphs.pad
    monkeypatch.setattr(inference_graphs, "pad", poisoned)
    for mine, theirs in zip(outputs(assembly.forward, data), expected, strict=True):
        assert np.array_equal(mine, theirs)
    assert changed > 0


@pytest.mark.parametrize("case", ["lora", "pals"])
def test_everything_that_a_run_infers_is_captured(tiny_bert: Path, tmp_path: Path, case: str) -> None:
    assembly = configured(tiny_bert, tmp_path, case)
    forward, names = assembly.forward, ("sst", "para", "sts")
    tokenised = assembly.data["sts"]["dev"]
    captures = captured(assembly, TapeRecorder())
    evaluator = Evaluator(
        forward,
        {name: TASKS[name] for name in names},
        assembly.data,
        assembly.losses,
        EvaluationConfig(train_examples=7, selection="half"),
        max_tokens=MOST_TOKENS,
        seed=3,
    )
    assert isinstance(forward, PackedForward)
    results: dict[bool, list[Any]] = {}
    for is_captured in (False, True):
        forward.graphs = captures if is_captured else None
        for _ in range(2 if is_captured else 1):
            evaluation = evaluator.evaluate()
            predictions = predict_split(forward, TASKS["sts"], tokenised, "dev", max_tokens=MOST_TOKENS)
        results[is_captured] = [evaluation.dev_loss, evaluation.train_loss, predictions.outputs]
    for mine, theirs in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert captures.counts["replayed"] > 0
    assert captures.counts.keys() == {"replayed", "warm-up"}
    # A training step has gradients and dropout: nothing of it comes from these captures.
    counts = dict(captures.counts)
    train(assembly)
    assert forward([Request(tokenised, np.arange(2), 0, 1.0)], None).outputs["sts"].requires_grad
    assert captures.counts == counts


def test_a_bound_and_a_failed_capture_are_counted_and_cost_nothing(
    tiny_bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assembly = build(tiny_bert, tmp_path, torch.float32)
    data = tables(assembly)
    expected = outputs(plain(assembly), data)
    for recorder, options, reason in (
        (Repeats(), {"most": 1, "warm_up": 0}, "eager (more than 1 shapes)"),
        (Unwilling(), {}, "eager (capture failed: operation not permitted when stream is capturing)"),
    ):
        captures = captured(assembly, recorder, **options)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                for mine, theirs in zip(outputs(assembly.forward, data), expected, strict=True):
                    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert captures.counts[reason] > 0
        assert len(captures.counts) == 2
        assert sum(captures.counts.values()) % 3 == 0, "every pass is counted once"
    assert any("a pass of sst is not captured" in record.message for record in caplog.records)


def test_shapes_are_few_and_hold_their_batches(tiny_bert: Path, tmp_path: Path) -> None:
    data = build(tiny_bert, tmp_path, torch.float32).data["sts"]["train"]
    shapes = set()
    for count in [*range(1, 9), *range(300, 600)]:
        batch = pack([Request(data, np.resize(np.arange(len(data)), count), 0, 1.0)])
        shape = coarse_shape(batch)
        padded = inference_graphs.pad(batch, shape)  # raises for what does not fit
        assert padded.tokens - batch.tokens < max(64, batch.tokens / 16)
        assert padded.rows < 2 * (batch.rows + 4 + (padded.tokens - batch.tokens) / batch.max_seqlen)
        assert padded.rows % data.rows_per_example == 0
        if count >= 300:
            shapes.add(shape)
    assert len(shapes) <= 20


def test_objectives_keep_steps_but_not_evaluations_from_being_captured(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_bert, tmp_path, graphs="auto")
    config.simcse.tasks = ["sts"]
    config.task["sts"] = TaskConfig(
        batch_size=6, max_length=64, head=HeadConfig(pooling="mean", pair=["cosine"])
    )
    assembly = assemble(config, dtype=torch.float32)
    forward, step = assembly.forward, assembly.step
    curriculum = curriculum_of(config, assembly.batches)
    assert isinstance(forward, PackedForward)
    no_gpu, hosts = "the device is cpu, and CUDA graphs need a GPU", "simcse choose rows on the host"
    assert graphs.use_graphs(config, step, curriculum) == f"off: {no_gpu}; {hosts}"
    assert forward.graphs is None
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: Repeats())
    monkeypatch.setattr(graphs, "inference_obstacles", lambda *_: [])
    with pytest.raises(ConfigError, match=f"graphs: always is not possible: {hosts}; possible"):
        graphs.use_graphs(replace(config, graphs="always"), step, curriculum)
    assert graphs.use_graphs(config, step, curriculum) == f"evaluations only: {hosts}"
    assert step.graphs is None
    assert step.budgets is None
    data = tables(assembly)
    for _ in range(2):
        outputs(forward, data)
    assert forward.graphs is not None
    assert forward.graphs.counts["replayed"] > 0

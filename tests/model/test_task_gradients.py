"""The gradients of all tasks from one backward pass of the whole model equal those of one pass a task."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed import Packed, random_batch
from torch import Tensor

from mtbert.kernels.segments import Segments, companion
from mtbert.model import (
    DropoutStream,
    ExtraHiddenConfig,
    HeadConfig,
    HeadSpec,
    LoraConfig,
    ModelConfig,
    MultiTaskModel,
    PalConfig,
    build_model,
)
from mtbert.model.lora import PROJECTIONS
from mtbert.model.pooling import segments_in_rows

F64 = torch.float64
TASKS = ("sst", "para", "sts")
SPECS = [
    HeadSpec("sst", 5, pair=False),
    HeadSpec("para", 1, pair=True),
    HeadSpec("sts", 1, pair=True, score_range=(0.0, 5.0)),
]
LENGTHS = {"sst": [5, 9, 1], "sst/simcse": [4, 4], "para": [14, 2], "sts": [7, 7], "sts/mnrl": [3]}
LORA = LoraConfig(rank=2, projections=list(PROJECTIONS))
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full, extra hidden and pals": (
        "full",
        {"extra_hidden": ExtraHiddenConfig(2), "pals": PalConfig(size=12, heads=3), "attention_heads": 8},
    ),
    "lora": ("lora", {"lora": LORA}),
    "lora, extra hidden": ("lora", {"lora": LORA, "extra_hidden": ExtraHiddenConfig(1, [1])}),
    "lora per task, pals": (
        "lora",
        {"lora": LoraConfig(rank=2, per_task=True), "pals": PalConfig(size=12, heads=3)},
    ),
    "bitfit": ("bitfit", {}),
    "heads": ("last-linear-layer", {}),
}


def build(
    folder: Path,
    mode: str = "full",
    poolings: tuple[str, str, str] = ("pooler", "cls", "pooler"),
    **options: Any,
) -> MultiTaskModel:
    pairs = {"sst": "cross-encoder", "para": ["concat"], "sts": ["cosine", "product"]}
    heads = {
        task: HeadConfig(pooling=pooling, pair=pairs[task])  # type: ignore[arg-type]
        for task, pooling in zip(TASKS, poolings, strict=True)
    }
    model = build_model(
        folder,
        ModelConfig(pretrained=str(folder), **options),
        mode=mode,
        specs=SPECS,
        heads=heads,
        max_lengths=dict.fromkeys(TASKS, 64),
        seed=3,
    ).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.1)
    model.add_stream("sst/simcse", "pooler")
    model.add_stream("sts/mnrl", "mean")
    return model


def bounds_of(batch: Packed, tasks: tuple[str, ...] = TASKS) -> tuple[int, ...]:
    sizes = [sum(len(s.tokens) for s in batch.segments if s.task == task) for task in tasks]
    return (0, *accumulate(sizes))


def losses(
    model: MultiTaskModel,
    batch: Packed,
    segments: Segments | None = None,
    dropout: DropoutStream | None = None,
) -> dict[str, Tensor]:
    """A loss of each task that all of its streams take part in."""
    rows = model.features(batch, dtype=F64, dropout=dropout, segments=segments)
    outputs = model.outputs_from_features(rows, dropout_rows=model.dropout_rows(batch), dropout=dropout)
    found: dict[str, Tensor] = {}
    for segment in batch.segments:
        part = rows[segment.stream].sin().sum()
        if segment.stream in outputs:
            part = part + outputs[segment.stream].square().sum()
        found[segment.task] = found.get(segment.task, torch.zeros((), dtype=F64)) + part
    return found


@pytest.mark.parametrize("dropout", [None, DropoutStream(4, 2)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(("mode", "options"), VARIANTS.values(), ids=VARIANTS)
def test_one_pass_gives_the_gradient_of_every_task(tiny_bert: Path, mode: str, options: dict, dropout):
    model, batch = build(tiny_bert, mode, **options), random_batch(LENGTHS, 100)
    shared = dict(model.shared_parameters())
    own = dict(model.task_parameters())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(shared.values()) | set(own) == set(trained.values())
    assert not set(shared.values()) & set(own)

    expected = {
        task: dict(
            zip(
                trained,
                torch.autograd.grad(loss, list(trained.values()), retain_graph=True, allow_unused=True),
                strict=True,
            )
        )
        for task, loss in losses(model, batch, None, dropout).items()
    }
    companions = {p: companion(p, len(TASKS)) for p in shared.values()}
    segments = Segments(bounds_of(batch), companions)
    torch.stack(list(losses(model, batch, segments, dropout).values())).sum().backward()

    for name, parameter in trained.items():
        if parameter in own:
            for task in TASKS:
                others = expected[task][name]
                assert task == own[parameter] or others is None or others.eq(0).all(), (name, task)
            assert torch.allclose(parameter.grad, expected[own[parameter]][name], rtol=1e-9, atol=1e-10), name
            continue
        assert parameter.grad is None, name
        found = companions[parameter].grad
        for group, task in enumerate(TASKS):
            wanted = expected[task][name]
            wanted = torch.zeros_like(parameter) if wanted is None else wanted
            assert torch.allclose(found[group], wanted, rtol=1e-9, atol=1e-10), (name, task)


def test_a_group_may_be_absent_from_a_batch(tiny_bert: Path):
    model = build(tiny_bert)
    batch = random_batch({"sst": [5, 9, 1], "sts": [7, 7]}, 100)
    shared = dict(model.shared_parameters())
    companions = {p: companion(p, len(TASKS)) for p in shared.values()}
    segments = Segments(bounds_of(batch), companions)
    torch.stack(list(losses(model, batch, segments).values())).sum().backward()
    for name, parameter in shared.items():
        assert companions[parameter].grad[1].eq(0).all(), name
        for group in (0, 2):
            (wanted,) = torch.autograd.grad(losses(model, batch)[TASKS[group]], parameter)
            assert torch.allclose(companions[parameter].grad[group], wanted, rtol=1e-9, atol=1e-10), name


# ---- which parameters are shared ----


@pytest.mark.parametrize(
    ("poolings", "stream", "is_shared"),
    [
        (("pooler", "pooler", "cls"), None, True),
        (("pooler", "cls", "cls"), None, False),
        (("pooler", "cls", "cls"), "sst/simcse", False),  # of the same task
        (("pooler", "cls", "cls"), "para/simcse", True),
        (("cls", "cls", "mean"), None, False),
    ],
)
def test_the_pooler_is_shared_by_the_tasks_that_pool_through_it(tiny_bert: Path, poolings, stream, is_shared):
    heads = {task: HeadConfig(pooling=pooling) for task, pooling in zip(TASKS, poolings, strict=True)}
    model = build_model(
        tiny_bert,
        ModelConfig(pretrained=str(tiny_bert)),
        mode="full",
        specs=SPECS,
        heads=heads,
        max_lengths={},
        seed=0,
    )
    if stream is not None:
        model.add_stream(stream, "pooler")
    shared = {name for name, _ in model.shared_parameters()}
    assert ("encoder.pooler.weight" in shared) == is_shared
    owners = {task for p, task in model.task_parameters() if p is model.encoder.pooler.weight}
    assert owners == ({"sst"} if "pooler" in poolings and not is_shared else set())
    assert "encoder.embeddings.word" in shared
    assert not any(name.startswith("heads.") for name in shared)


def test_nothing_is_shared_by_one_task(tiny_bert: Path):
    model = build_model(
        tiny_bert,
        ModelConfig(pretrained=str(tiny_bert)),
        mode="full",
        specs=SPECS[:1],
        heads={"sst": HeadConfig()},
        max_lengths={},
        seed=0,
    )
    assert model.shared_parameters() == []


def test_layers_and_adapters_of_one_task_belong_to_it(tiny_bert: Path):
    model = build(
        tiny_bert, "lora", lora=LoraConfig(per_task=True), pals=PalConfig(size=12, heads=3, layers=[0])
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned: dict[str, set[str]] = {}
    for parameter, task in model.task_parameters():
        owned.setdefault(task, set()).add(names[parameter])
    assert set(owned) == set(TASKS)
    for task, found in owned.items():
        assert f"encoder.pals.tasks.{task}.query_key_value.0.weight" in found
        assert f"encoder.layers.1.query_key_value.task_adapters.{task}.value.lora_b" in found
        assert all(f".{task}." in name for name in found)
    assert model.shared_parameters() == []


# ---- bounds in rows ----


def test_bounds_in_rows():
    batch = random_batch(LENGTHS, 100)
    segments = Segments(bounds_of(batch), {})
    assert segments_in_rows(segments, batch.segments).bounds == (0, 5, 7, 10)
    chosen = [segment for segment in batch.segments if segment.stream in ("sst/simcse", "sts", "sts/mnrl")]
    assert segments_in_rows(segments, chosen).bounds == (0, 2, 2, 5)


@pytest.mark.parametrize("bounds", [(0, 20, 56), (0, 15, 38, 56), (0, 10)])
def test_bounds_that_cut_a_segment_are_refused(bounds: tuple[int, ...]):
    batch = random_batch(LENGTHS, 100)
    with pytest.raises(ValueError, match="is in no single group of tokens"):
        segments_in_rows(Segments(bounds, {}), batch.segments)

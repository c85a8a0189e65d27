"""A last layer at first tokens alone gives what the whole layer gives there: outputs, masks and gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed import Packed, random_batch
from torch import Tensor

from mtbert.kernels import attention, dispatch
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
    merge,
)
from mtbert.model import bert as bert_module
from mtbert.model.first_tokens import FirstTokens
from mtbert.model.lora import PROJECTIONS

F64 = torch.float64
TASKS = ("sst", "para", "sts")
SPECS = [
    HeadSpec("sst", 5, pair=False),
    HeadSpec("para", 1, pair=True),
    HeadSpec("sts", 1, pair=True, score_range=(0.0, 5.0)),
]
LENGTHS = {"sst": [5, 9, 1], "sst/simcse": [4, 4], "para": [14, 2], "sts": [7, 37]}
LORA = LoraConfig(rank=2, projections=list(PROJECTIONS))  # type: ignore[arg-type]
PALS = PalConfig(size=12, heads=3)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "one layer": ("full", {"pool_layer": 1}),
    "bitfit": ("bitfit", {}),
    "pals and extra hidden": ("full", {"extra_hidden": ExtraHiddenConfig(2), "pals": PALS}),
    "lora": ("lora", {"lora": LORA}),
    "lora of query": ("lora", {"lora": replace(LORA, projections=["query"])}),
    "lora of value": ("lora", {"lora": replace(LORA, projections=["value"])}),
    "lora of the last layer": ("lora", {"lora": replace(LORA, layers=[1])}),
    "lora of each task, pals": ("lora", {"lora": replace(LORA, per_task=True), "pals": PALS}),
}


def build(
    folder: Path, mode: str = "full", pooling: str = "cls", mixed: bool = False, **options: Any
) -> MultiTaskModel:
    """Every parameter that is trained is moved from where it starts: zeros would hide what they multiply.

    mixed: some streams, not side by side, are pooled by their mean.
    """
    heads = {task: HeadConfig(pooling=pooling) for task in TASKS}  # type: ignore[arg-type]
    heads["para"] = replace(heads["para"], pooling="pooler")
    if mixed:
        heads["sts"] = replace(heads["sts"], pooling="mean")
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
    model.add_stream("sst/simcse", "mean" if mixed else pooling)  # type: ignore[arg-type]
    return model


def outputs(
    model: MultiTaskModel,
    batch: Packed,
    monkeypatch: pytest.MonkeyPatch,
    *,
    whole: bool,
    dtype: torch.dtype = F64,
    dropout: DropoutStream | None = None,
    segments: Segments | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Pooled rows and outputs; whole: with a last layer that computes every token."""
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(MultiTaskModel, "first_token_streams", lambda *_: set())
        rows = model.features(batch, dtype=dtype, dropout=dropout, segments=segments)
        return rows, model.outputs_from_features(
            rows, dropout_rows=model.dropout_rows(batch), dropout=dropout
        )


def total(found: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
    return torch.stack([x.sin().sum() for part in found for x in part.values()]).sum()


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("dropout", [None, DropoutStream(4, 2)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize(("mode", "options"), VARIANTS.values(), ids=VARIANTS)
def test_outputs_and_gradients(
    tiny_bert: Path, mode: str, options: dict, dropout, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_bert, mode, mixed=mixed, **options), random_batch(LENGTHS, 100)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = outputs(model, batch, monkeypatch, whole=True, dropout=dropout)
    found = outputs(model, batch, monkeypatch, whole=False, dropout=dropout)
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.keys() == ours.keys()
        for stream, values in theirs.items():
            assert (ours[stream] - values).abs().max() <= 1e-12, stream
    wanted = torch.autograd.grad(total(expected), list(trained.values()), allow_unused=True)
    got = torch.autograd.grad(total(found), list(trained.values()), allow_unused=True)
    for name, theirs, ours in zip(trained, wanted, got, strict=True):
        assert (theirs is None) == (ours is None), name
        assert theirs is None or torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(("mode", "options"), VARIANTS.values(), ids=VARIANTS)
def test_gradients_of_every_task(
    tiny_bert: Path, mode: str, options: dict, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_bert, mode, mixed=mixed, **options), random_batch(LENGTHS, 100)
    shared = dict(model.shared_parameters())
    sizes = [sum(len(s.tokens) for s in batch.segments if s.task == task) for task in TASKS]

    def companions(whole: bool) -> dict[str, Tensor | None]:
        taken = {p: companion(p, len(TASKS)) for p in shared.values()}
        segments = Segments((0, *accumulate(sizes)), taken)
        found = outputs(
            model, batch, monkeypatch, whole=whole, segments=segments, dropout=DropoutStream(4, 2)
        )
        total(found).backward()
        return {name: taken[p].grad for name, p in shared.items()}

    expected, found = companions(True), companions(False)
    for name, theirs in expected.items():
        ours = found[name]
        assert theirs is not None, name
        assert ours is not None, name
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12), name
    assert all(p.grad is None for p in shared.values())


def test_rows_without_tokens(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they give means nothing, but it is a number, and no other row sees it."""
    model, batch = build(tiny_bert), random_batch({"sst": [5, 0, 3], "para": [4, 0]}, 100)
    expected = outputs(model, batch, monkeypatch, whole=True)[0]
    found = outputs(model, batch, monkeypatch, whole=False)[0]
    for stream, rows in (("sst", [0, 2]), ("para", [0])):
        assert found[stream].isfinite().all()
        assert (found[stream][rows] - expected[stream][rows]).abs().max() <= 1e-12


@pytest.mark.parametrize("lengths", [{"sst": [0], "sts": [3, 2]}, {"sst": [3, 2], "sts": [0, 0]}], ids=str)
def test_streams_without_tokens(tiny_bert: Path, lengths: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside others, whether they are pooled by first tokens or by their mean."""
    model, batch = build(tiny_bert, mixed=True, pals=PALS), random_batch(lengths, 100)
    expected = outputs(model, batch, monkeypatch, whole=True)[0]
    found = outputs(model, batch, monkeypatch, whole=False)[0]
    for stream, rows in found.items():
        assert rows.isfinite().all()
        assert not any(lengths[stream]) or torch.equal(rows, expected[stream])


def test_merged_adapters(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(tiny_bert, "lora", lora=LORA), random_batch(LENGTHS, 100)
    merge(model.encoder)
    expected = outputs(model, batch, monkeypatch, whole=True)[1]
    for task, found in outputs(model, batch, monkeypatch, whole=False)[1].items():
        assert (found - expected[task]).abs().max() <= 1e-12


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "some"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
def test_narrow_types(
    tiny_bert: Path, dtype, tolerance: float, mixed: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_bert, mixed=mixed).float(), random_batch(LENGTHS, 100)
    with dispatch.use_backend(backend):
        expected, found = (
            outputs(model, batch, monkeypatch, whole=whole, dtype=dtype, dropout=DropoutStream(1, 1))[0]
            for whole in (True, False)
        )
    for stream, rows in found.items():
        assert rows.dtype == expected[stream].dtype
        assert (rows - expected[stream]).abs().max() <= tolerance


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean"])
def test_it_is_done_where_first_tokens_alone_are_read(
    tiny_bert: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = build(tiny_bert, pooling=pooling), random_batch(LENGTHS, 100)
    calls: list[int] = []
    count = lambda *a, **k: (calls.append(1), attention(*a, **k))[1]  # noqa: E731
    monkeypatch.setattr(bert_module.kernels, "attention", count)
    model.features(batch, dtype=F64)
    layers = len(model.encoder.layers)
    assert len(calls) == (layers if pooling == "mean" else layers - 1)
    assert model.first_token_streams(random_batch({"para": [3, 4]}, 100)) == {"para"}


def test_other_streams_keep_their_tokens(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer sees the tokens of those that are pooled by their mean, and no more."""
    model, batch = build(tiny_bert, mixed=True), random_batch(LENGTHS, 100)
    seen: list[int] = []
    count = lambda qkv, *a, **k: (seen.append(len(qkv)), attention(qkv, *a, **k))[1]  # noqa: E731
    monkeypatch.setattr(bert_module.kernels, "attention", count)
    model.features(batch, dtype=F64)
    assert seen == [sum(map(sum, LENGTHS.values())), sum(LENGTHS["sst/simcse"]) + sum(LENGTHS["sts"])]


def test_a_probe_s_rows_may_be_read_too(tiny_bert: Path) -> None:
    model = build(tiny_bert)
    model.add_probe("sst/probe", "mean")
    found = model.features(random_batch({"sst": [5, 2], "sst/probe": [4]}, 100), dtype=F64)
    assert {stream: len(rows) for stream, rows in found.items()} == {"sst": 2, "sst/probe": 1}


def test_the_first_tokens_are_a_batch_of_their_own() -> None:
    batch = random_batch({"sst": [5, 9], "para": [3]}, 100)
    first = FirstTokens(batch)
    places = [0, 5, 14]
    assert first.places.tolist() == places
    for name in ("input_ids", "token_type_ids", "position_ids", "dropout_row"):
        assert getattr(first, name).tolist() == getattr(batch, name)[places].tolist()
    assert first.cu_seqlens.tolist() == [0, 1, 2, 3]
    assert first.max_seqlen == 1
    assert [(s.stream, s.rows, s.tokens) for s in first.segments] == [
        ("sst", range(0, 2), range(0, 2)),
        ("para", range(2, 3), range(2, 3)),
    ]

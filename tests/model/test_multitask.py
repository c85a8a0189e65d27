"""One packed pass for all tasks: pooling, modes, cached features, and counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.packed import Packed, random_batch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.model import (
    DropoutStream,
    HeadConfig,
    HeadSpec,
    LoraConfig,
    MultiTaskModel,
    add_lora,
    build_heads,
    load_encoder,
)

SPECS = [
    HeadSpec("sst", 5, pair=False),
    HeadSpec("para", 1, pair=True),
    HeadSpec("sts", 1, pair=True, score_range=(0.0, 5.0)),
]
LENGTHS = {"sst": [4, 1, 9], "para": [3, 6, 2, 2], "sts": [5, 5]}
PAIR = HeadConfig(pair=["concat"], dropout=0.2)
HEADS = {"sst": replace(PAIR, pooling="mean"), "para": PAIR, "sts": replace(PAIR, pooling="mean")}
F64 = torch.float64


def make(
    folder: Path, heads: dict[str, HeadConfig] = HEADS, *, lora: bool = False, mode: str | None = None
) -> MultiTaskModel:
    generator = torch.Generator().manual_seed(0)
    encoder = load_encoder(folder, dtype=F64)
    if lora:
        add_lora(encoder, LoraConfig(rank=2, layers=[1]), generator)
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if "lora_b" in name:
                    parameter.normal_(generator=generator)
    specs = [spec for spec in SPECS if spec.name in heads]
    model = MultiTaskModel(encoder, build_heads(specs, heads, 32, generator)).double()
    if mode is not None:
        model.set_mode(mode)
    return model


def batch_of(lengths: dict[str, list[int]] = LENGTHS) -> Packed:
    return random_batch(lengths, 100)


# ---- pooling ----


@pytest.mark.parametrize(
    "poolings", [("cls", "mean", "cls"), ("mean", "mean", "pooler"), ("pooler", "cls", "mean")]
)
def test_every_task_pools_its_own_rows(tiny_bert: Path, poolings: tuple[str, ...]):
    heads = {spec.name: replace(PAIR, pooling=pooling) for spec, pooling in zip(SPECS, poolings, strict=True)}
    model, batch = make(tiny_bert, heads), batch_of()
    with torch.no_grad():
        features = model.features(batch, dtype=F64)
        rows = model.encoder(batch, dtype=F64).split(batch.lengths)
        assert set(features) == set(LENGTHS)
        for segment in batch.segments:
            own = [rows[row] for row in segment.rows]
            expected = {
                "cls": lambda own=own: torch.stack([row[0] for row in own]),
                "mean": lambda own=own: torch.stack([row.mean(0) for row in own]),
                "pooler": lambda own=own: torch.tanh(
                    model.encoder.pooler(torch.stack([row[0] for row in own]))
                ),
            }[heads[segment.task].pooling]()
            assert features[segment.task].shape == (len(segment.rows), 32)
            assert (features[segment.task] - expected).abs().max().item() < 1e-13


def test_tasks_do_not_depend_on_their_company(tiny_bert: Path):
    model, batch = make(tiny_bert), batch_of()
    with torch.no_grad():
        together = model(batch, dtype=F64)
        rows = dict(zip(LENGTHS, (range(0, 3), range(3, 7), range(7, 9)), strict=True))
        for task, own in rows.items():
            alone = model(part_of(batch, task, own), dtype=F64)
            assert list(alone) == [task]
            assert (alone[task] - together[task]).abs().max().item() < 1e-12


def part_of(batch: Packed, task: str, rows: range) -> Packed:
    start, stop = batch.cu_seqlens[rows.start].item(), batch.cu_seqlens[rows.stop].item()
    segment = next(segment for segment in batch.segments if segment.task == task)
    return replace(
        batch,
        input_ids=batch.input_ids[start:stop].clone(),
        token_type_ids=batch.token_type_ids[start:stop].clone(),
        position_ids=batch.position_ids[start:stop].clone(),
        dropout_row=batch.dropout_row[start:stop].clone(),
        cu_seqlens=batch.cu_seqlens[rows.start : rows.stop + 1] - start,
        segments=(replace(segment, rows=range(len(rows)), tokens=range(stop - start)),),
    )


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_rows_without_tokens_are_finite_and_get_no_gradient(tiny_bert: Path, pooling: str):
    heads = {"sst": HeadConfig(pooling=pooling, dropout=0.0), "para": replace(PAIR, pooling=pooling)}
    model = make(tiny_bert, heads)
    full = batch_of({"sst": [4, 3], "para": [3, 6]})
    empty_at_the_end = batch_of({"sst": [4, 3, 0], "para": [3, 6, 0, 0]})
    plain, padded = model(full, dtype=F64), model(empty_at_the_end, dtype=F64)
    gradients = []
    for outputs in (plain, padded):
        assert all(output.isfinite().all() for output in outputs.values())
        loss = outputs["sst"][:2].square().sum() + outputs["para"][:1].square().sum()
        loss = loss + sum(0 * output[-1].sum() for output in outputs.values())
        gradients.append(torch.autograd.grad(loss, model.encoder.layers[0].output.weight)[0])
    assert torch.allclose(plain["sst"], padded["sst"][:2], rtol=0, atol=1e-12)
    assert torch.allclose(gradients[0], gradients[1], rtol=0, atol=1e-12)


def test_a_task_twice_in_a_batch_is_refused(tiny_bert: Path):
    model, batch = make(tiny_bert), batch_of()
    twice = replace(batch, segments=(*batch.segments, batch.segments[0]))
    with pytest.raises(ValueError, match="two segments"):
        model(twice, dtype=F64)


# ---- streams ----

STREAMS = {"sst": [4, 1, 9], "sst/simcse": [4, 4], "para": [3, 6, 2, 2], "para/mnrl": [7, 2], "sts": [5, 5]}


def test_rows_of_objectives_are_pooled_and_have_no_outputs(tiny_bert: Path):
    model, batch = make(tiny_bert), batch_of(STREAMS)
    assert model.poolings == {"sst": "mean", "para": "cls", "sts": "mean"}
    model.add_stream("sst/simcse", "cls")
    model.add_stream("para/mnrl", "pooler")
    with torch.no_grad():
        features = model.features(batch, dtype=F64)
        outputs = model.outputs_from_features(features, dropout_rows=model.dropout_rows(batch))
        states = dict(zip(STREAMS, model.encoder(batch, dtype=F64).split([14, 8, 13, 9, 10]), strict=True))
        pooled = torch.tanh(model.encoder.pooler(states["para/mnrl"][[0, 7]]))
        assert list(model(batch, dtype=F64)) == list(outputs)
    assert set(features) == set(STREAMS)
    assert set(outputs) == {"sst", "para", "sts"}
    assert torch.equal(features["sst/simcse"], states["sst/simcse"][[0, 4]])
    assert torch.allclose(features["para/mnrl"], pooled, rtol=0, atol=1e-13)
    assert torch.allclose(features["sts"], states["sts"].view(2, 5, -1).mean(1), rtol=0, atol=1e-13)


def test_first_tokens_have_their_dropout_rows(tiny_bert: Path):
    rows = make(tiny_bert).dropout_rows(batch_of(STREAMS))
    assert {stream: row.tolist() for stream, row in rows.items()} == {
        "sst": [0, 4096, 8192],
        "sst/simcse": [3 * 4096, 4 * 4096],
        "para": [n * 4096 for n in range(5, 9)],
        "para/mnrl": [9 * 4096, 10 * 4096],
        "sts": [11 * 4096, 12 * 4096],
    }


def test_a_stream_through_the_pooler_trains_it(tiny_bert: Path):
    model = make(tiny_bert)
    model.add_stream("sst/simcse", "cls")
    assert "encoder.pooler.weight" not in trained(model)
    model.add_stream("para/simcse", "pooler")
    assert "encoder.pooler.weight" in trained(model)
    frozen = make(tiny_bert, mode="last-linear-layer")
    frozen.add_stream("para/simcse", "pooler")
    assert "encoder.pooler.weight" not in trained(frozen)


def test_a_probe_is_pooled_and_changes_nothing_of_what_is_trained(tiny_bert: Path):
    model, batch = make(tiny_bert), batch_of(STREAMS)
    model.add_stream("sst/simcse", "pooler")
    before = trained(model), model.shared_parameters(), dict(model.poolings)
    model.encoder.embeddings.word.requires_grad_(False)  # as unfreezing does
    model.add_probe("para/mnrl", "pooler")
    assert not model.encoder.embeddings.word.requires_grad
    model.encoder.embeddings.word.requires_grad_(True)
    assert before == (trained(model), model.shared_parameters(), dict(model.poolings))
    assert "encoder.pooler.weight" not in [name for name, _ in model.shared_parameters()]
    with torch.no_grad():
        rows = model.features(batch, dtype=F64)
    assert rows["para/mnrl"].shape == (2, 32)
    plain = make(tiny_bert)
    plain.add_probe("sts/quality", "pooler")
    assert "encoder.pooler.weight" not in trained(plain)


def test_impossible_streams(tiny_bert: Path):
    model = make(tiny_bert)
    model.add_probe("sts/quality", "cls")
    for add in (model.add_stream, model.add_probe):
        with pytest.raises(ValueError, match="there is a stream 'sts/quality' already"):
            add("sts/quality", "cls")
    with pytest.raises(ValueError, match="there is a stream 'sst' already"):
        model.add_stream("sst", "cls")
    with pytest.raises(ValueError, match="unknown pooling 'max'; possible: cls, pooler, mean"):
        model.add_stream("sst/x", "max")


def test_noise_is_added_to_the_embeddings(tiny_bert: Path):
    model, batch = make(tiny_bert), batch_of()
    noise = torch.zeros(batch.input_ids.shape[0], 32, dtype=F64, requires_grad=True)
    with torch.no_grad():
        plain = model(batch, dtype=F64)
    outputs = model(batch, dtype=F64, noise=noise)
    assert all(torch.equal(outputs[task], plain[task]) for task in plain)
    sst = batch.segments[0].tokens
    (gradient,) = torch.autograd.grad(outputs["sst"].square().sum(), noise)
    assert gradient[: sst.stop].abs().amax(1).min().item() > 0
    assert gradient[sst.stop :].eq(0).all()


# ---- outputs ----


def test_shapes_and_dtype(tiny_bert: Path):
    outputs = make(tiny_bert).float()(batch_of(), dtype=torch.bfloat16, dropout=DropoutStream(0, 0))
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        "sst": (3, 5),
        "para": (2, 1),
        "sts": (1, 1),
    }
    assert all(output.dtype == torch.float32 for output in outputs.values())


def test_any_subset_of_the_tasks(tiny_bert: Path):
    model = make(tiny_bert, {"sst": HEADS["sst"]})
    assert set(model(batch_of({"sst": [3, 4]}), dtype=F64)) == {"sst"}


@pytest.mark.parametrize("stream", [None, DropoutStream(3, 1)], ids=["no dropout", "dropout"])
def test_cached_features_give_the_same_outputs(tiny_bert: Path, stream: DropoutStream | None):
    model, batch = make(tiny_bert, mode="last-linear-layer"), batch_of()
    with torch.no_grad():
        expected = model(batch, dtype=F64, dropout=stream)
        features = model.features(batch, dtype=F64)
        first = batch.dropout_row[batch.cu_seqlens[:-1].long()]
        rows = {s.task: first[s.rows.start : s.rows.stop] for s in batch.segments}
        found = model.outputs_from_features(features, dropout_rows=rows, dropout=stream)
    assert all(torch.equal(found[task], expected[task]) for task in expected)


def test_a_frozen_encoder_drops_nothing(tiny_bert: Path):
    batch, stream = batch_of(), DropoutStream(3, 1)

    def change(mode: str) -> float:
        model = make(tiny_bert, mode=mode)
        with torch.no_grad():
            plain = model.features(batch, dtype=F64)
            dropped = model.features(batch, dtype=F64, dropout=stream)
        return max((plain[task] - dropped[task]).abs().max().item() for task in plain)

    assert change("last-linear-layer") == 0
    assert change("full") > 0.01


# ---- modes ----


def trained(model: MultiTaskModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: MultiTaskModel) -> set[str]:
    outputs = model(batch_of(), dtype=F64)
    sum(output.square().sum() for output in outputs.values()).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
def test_last_linear_layer_trains_the_heads(tiny_bert: Path, lora: bool):
    model = make(tiny_bert, lora=lora, mode="last-linear-layer")
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    assert gradients(model) == trained(model)


def test_lora_trains_adapters_and_heads(tiny_bert: Path):
    model = make(tiny_bert, lora=True)
    assert model.mode == "lora"
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if name.startswith("heads.") or ".lora_" in name}
    assert gradients(model) == trained(model)


@pytest.mark.parametrize("pooler", [False, True])
def test_full_trains_what_gets_a_gradient(tiny_bert: Path, pooler: bool):
    heads = HEADS | ({"para": replace(PAIR, pooling="pooler")} if pooler else {})
    model = make(tiny_bert, heads)
    assert model.mode == "full"
    names = {name for name, _ in model.named_parameters()}
    assert trained(model) == {name for name in names if pooler or not name.startswith("encoder.pooler.")}
    assert gradients(model) == trained(model)


@pytest.mark.parametrize("pooler", [False, True])
def test_bitfit_trains_the_biases_and_the_heads(tiny_bert: Path, pooler: bool):
    heads = HEADS | ({"para": replace(PAIR, pooling="pooler")} if pooler else {})
    model = make(tiny_bert, heads, mode="bitfit")
    names = {name for name, _ in model.named_parameters()}
    biases = {name for name in names if name.startswith("encoder.") and name.endswith(".bias")}
    assert len(biases) == 1 + 2 * 6 + 1
    if not pooler:
        biases.remove("encoder.pooler.bias")
    assert trained(model) == biases | {name for name in names if name.startswith("heads.")}
    assert gradients(model) == trained(model)


def test_modes_can_be_changed(tiny_bert: Path):
    model = make(tiny_bert, mode="last-linear-layer")
    model.set_mode("full")
    assert "encoder.embeddings.word" in trained(model)


@pytest.mark.parametrize(
    ("alias", "mode"), [("pretrain", "last-linear-layer"), ("finetune", "full"), ("full-model", "full")]
)
def test_the_courses_names(tiny_bert: Path, alias: str, mode: str):
    assert make(tiny_bert, mode=alias).mode == mode


def test_impossible_modes(tiny_bert: Path):
    with pytest.raises(
        ConfigError, match="mode: unknown mode 'half'; possible: full, last-linear-layer, lora, bitfit"
    ):
        make(tiny_bert, mode="half")
    with pytest.raises(ConfigError, match="mode: lora does not fit an encoder that has no LoRA adapters"):
        make(tiny_bert, mode="lora")
    with pytest.raises(ConfigError, match="mode: full does not fit an encoder that has LoRA adapters"):
        make(tiny_bert, lora=True, mode="full")
    with pytest.raises(ConfigError, match="mode: bitfit does not fit an encoder that has LoRA adapters"):
        make(tiny_bert, lora=True, mode="bitfit")
    with pytest.raises(ConfigError, match="last-linear-layer leaves nothing to train"):
        make(tiny_bert, {"sts": HeadConfig(pair=["cosine"])}, mode="last-linear-layer")


def test_parameters_are_counted_by_part(tiny_bert: Path):
    counts = {count.part: count for count in make(tiny_bert, lora=True).parameter_counts()}
    assert list(counts) == [
        "embeddings",
        "layers",
        "lora",
        "pooler",
        "head sst",
        "head para",
        "head sts",
        "total",
    ]
    # Adapters of query and value in one layer: two of rank 2 and width 32.
    assert (counts["lora"].trainable, counts["lora"].total) == (2 * 2 * 2 * 32, 2 * 2 * 2 * 32)
    assert (counts["pooler"].trainable, counts["pooler"].total) == (0, 32 * 32 + 32)
    assert counts["head sst"].trainable == 5 * 32 + 5
    assert counts["head para"].trainable == 2 * 32 + 1
    assert counts["layers"].total == 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32)
    assert counts["total"].trainable == 256 + 165 + 65 + 65
    assert counts["total"].total == sum(c.total for part, c in counts.items() if part != "total")


def test_the_state_survives_a_round_trip(tiny_bert: Path):
    one, two = make(tiny_bert, lora=True), make(tiny_bert, lora=True)
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.zero_()
    two.load_state_dict(one.state_dict())
    batch = batch_of()
    with torch.no_grad():
        expected, found = one(batch, dtype=F64), two(batch, dtype=F64)
    assert all(torch.equal(expected[task], found[task]) for task in expected)
    assert all(isinstance(value, Tensor) for value in one.state_dict().values())

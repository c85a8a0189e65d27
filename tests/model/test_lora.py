"""LoRA: the same as PEFT, neutral at the start, and folded in and out without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.naive_bert import naive_hidden
from support.packed import attention_mask, padded, random_batch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.model import (
    BertEncoder,
    DropoutStream,
    LoraConfig,
    add_lora,
    load_encoder,
    merge,
    unmerge,
)
from mtbert.model.lora import PROJECTIONS, LoraAdapter, adapted_weights
from mtbert.model.pretrained import hugging_face_views

BATCH = random_batch({"any": [5, 9, 1, 3]}, 100)
EVERYWHERE = LoraConfig(rank=3, alpha=7.0, dropout=0.0, projections=list(PROJECTIONS))


def adapted(
    folder: Path, config: LoraConfig = EVERYWHERE, dtype: torch.dtype = torch.float64, *, trained: bool = True
) -> BertEncoder:
    encoder = load_encoder(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    add_lora(encoder, config, generator)
    if trained:
        with torch.no_grad():
            for module in encoder.modules():
                if isinstance(module, LoraAdapter):
                    module.lora_b.copy_(torch.randn(module.lora_b.shape, generator=generator) * 0.2)
    return encoder


def hidden_states(encoder: BertEncoder) -> Tensor:
    with torch.no_grad():
        return encoder(BATCH, dtype=encoder.pooler.weight.dtype)


def distance(one: Tensor, two: Tensor) -> float:
    return (one - two).abs().max().item()


def test_training_starts_at_the_pretrained_model(tiny_bert: Path):
    plain = load_encoder(tiny_bert, dtype=torch.float64)
    start = adapted(tiny_bert, trained=False)
    assert distance(hidden_states(start), hidden_states(plain)) < 1e-14
    assert distance(hidden_states(adapted(tiny_bert)), hidden_states(plain)) > 0.1


def test_only_the_adapters_are_trainable_and_all_get_a_gradient(tiny_bert: Path):
    encoder = adapted(tiny_bert)
    encoder(BATCH, dtype=torch.float64).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None) == (".lora_" in name), name
    assert sum(".lora_a" in name for name, _ in encoder.named_parameters()) == 2 * 6


def test_adapters_are_drawn_from_the_generator_as_in_the_paper(tiny_bert: Path):
    one, two = adapted(tiny_bert, trained=False), adapted(tiny_bert, trained=False)
    for (_, first), (_, second) in zip(adapted_weights(one), adapted_weights(two), strict=True):
        assert torch.equal(first.lora_a, second.lora_a)
        assert first.lora_b.eq(0).all()
        limit = first.lora_a.shape[1] ** -0.5
        assert 0.8 * limit < first.lora_a.abs().max().item() <= limit


def test_the_forward_pass_equals_peft(tiny_bert: Path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    names = {
        "query": "query",
        "key": "key",
        "value": "value",
        "attention_output": "attention.output.dense",
        "intermediate": "intermediate.dense",
        "output": r"output.dense",
    }
    encoder = adapted(tiny_bert)
    model = transformers.BertModel.from_pretrained(tiny_bert, attn_implementation="eager").double()
    pattern = (
        r"encoder\.layer\..*\.(query|key|value|attention\.output\.dense|intermediate\.dense|output\.dense)"
    )
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=7.0, lora_dropout=0.0, target_modules=pattern)
    ).double()
    filled = 0
    with torch.no_grad():
        for number, layer in enumerate(encoder.layers):
            for name, path in names.items():
                if name in ("query", "key", "value"):
                    ours, path = layer.query_key_value.adapter(name), f"attention.self.{path}"
                else:
                    ours = getattr(layer, name).adapter
                theirs = model.get_submodule(f"base_model.model.encoder.layer.{number}.{path}")
                theirs.lora_A["default"].weight.copy_(ours.lora_a)
                theirs.lora_B["default"].weight.copy_(ours.lora_b)
                filled += 1
        mask = attention_mask(BATCH)
        expected = model.eval()(
            input_ids=padded(BATCH, BATCH.input_ids),
            token_type_ids=padded(BATCH, BATCH.token_type_ids),
            attention_mask=mask.long(),
        ).last_hidden_state[mask]
    assert filled == 12
    assert distance(hidden_states(encoder), expected) < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_merge_computes_the_same_and_unmerge_restores(tiny_bert: Path, dtype: torch.dtype, tolerance: float):
    encoder = adapted(tiny_bert, dtype=dtype)
    before = {name: view.detach().clone() for name, view in hugging_face_views(encoder)}
    expected = hidden_states(encoder)
    merge(encoder)
    merge(encoder)  # a second time changes nothing
    folded = {name for name, view in hugging_face_views(encoder) if not torch.equal(view, before[name])}
    assert len(folded) == 2 * 6
    assert distance(hidden_states(encoder), expected) < tolerance * 10
    unmerge(encoder)
    unmerge(encoder)
    for name, view in hugging_face_views(encoder):
        assert distance(view, before[name]) <= tolerance, name
    assert distance(hidden_states(encoder), expected) < tolerance * 10


def test_a_merged_encoder_gives_no_state(tiny_bert: Path):
    encoder = adapted(tiny_bert)
    state = encoder.state_dict()
    merge(encoder)
    with pytest.raises(RuntimeError, match="unmerge"):
        encoder.state_dict()
    unmerge(encoder)
    assert encoder.state_dict().keys() == state.keys()


@pytest.mark.parametrize("wrong", [merge, unmerge])
def test_an_encoder_without_adapters_cannot_be_merged(tiny_bert: Path, wrong):
    with pytest.raises(ValueError, match="no LoRA"):
        wrong(load_encoder(tiny_bert))


def test_adapters_are_added_once(tiny_bert: Path):
    encoder = adapted(tiny_bert)
    with pytest.raises(ValueError, match="already"):
        add_lora(encoder, EVERYWHERE)


@pytest.mark.parametrize(("stabilised", "expected"), [(False, 8.0), (True, 16.0)])
def test_scale(stabilised: bool, expected: float):
    config = LoraConfig(rank=4, alpha=32.0, rank_stabilised=stabilised)
    assert config.scale == expected
    assert LoraAdapter(3, 5, config).scale == expected


def test_rank_stabilised_adapters_compute_with_that_scale(tiny_bert: Path):
    config = replace(EVERYWHERE, rank_stabilised=True)
    encoder = adapted(tiny_bert, config)
    expected = naive_hidden(encoder, BATCH).detach()
    assert distance(hidden_states(encoder), expected) < 1e-10
    assert distance(hidden_states(adapted(tiny_bert)), expected) > 0.01
    merge(encoder)
    assert distance(hidden_states(encoder), expected) < 1e-10


# ---- adapters of one task each ----

TASKS = random_batch({"sst": [5, 9], "sst/simcse": [5, 2], "para": [1, 3], "other": [4]}, 100)


def adapted_by_task(
    folder: Path, config: LoraConfig = EVERYWHERE, *, trained: bool = True, dtype: torch.dtype = torch.float64
) -> BertEncoder:
    encoder = load_encoder(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    add_lora(encoder, replace(config, per_task=True), generator, tasks=["sst", "para"])
    if trained:
        with torch.no_grad():
            for module in encoder.modules():
                if isinstance(module, LoraAdapter):
                    module.lora_b.copy_(torch.randn(module.lora_b.shape, generator=generator) * 0.2)
    return encoder


@pytest.mark.parametrize("projections", [list(PROJECTIONS), ["query", "output"]])
def test_every_task_has_its_own_adapters(tiny_bert: Path, projections: list[str]):
    encoder = adapted_by_task(tiny_bert, replace(EVERYWHERE, projections=projections))
    with torch.no_grad():
        found = encoder(TASKS, dtype=torch.float64)
    assert distance(found, naive_hidden(encoder, TASKS).detach()) < 1e-10
    with torch.no_grad():
        plain = load_encoder(tiny_bert, dtype=torch.float64)(TASKS, dtype=torch.float64)
    other = TASKS.segments[-1].tokens
    assert distance(found[: other.start], plain[: other.start]) > 0.1
    assert distance(found[other.start :], plain[other.start :]) < 1e-13


def test_gradients_of_the_tasks_adapters(tiny_bert: Path):
    encoder = adapted_by_task(tiny_bert)
    upstream = torch.randn(TASKS.input_ids.shape[0], 32, dtype=torch.float64)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 6 * 2
    found = torch.autograd.grad(encoder(TASKS, dtype=torch.float64), list(trained.values()), upstream)
    expected = torch.autograd.grad(naive_hidden(encoder, TASKS), list(trained.values()), upstream)
    for name, ours, theirs in zip(trained, found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10), name


def test_dropout_of_the_tasks_adapters_is_that_of_shared_ones(tiny_bert: Path):
    config = replace(EVERYWHERE, dropout=0.3)
    batch, stream = random_batch({"sst": [5, 9], "para": [1, 3]}, 100), DropoutStream(3, 5)
    own, shared = adapted_by_task(tiny_bert, config), adapted(tiny_bert, config)
    with torch.no_grad():
        for number, layer in enumerate(own.layers):
            for name in PROJECTIONS:
                for task in ("sst", "para"):
                    if name in ("query", "key", "value"):
                        target = layer.query_key_value.task_adapters[task][name]
                        source = shared.layers[number].query_key_value.adapter(name)
                    else:
                        target = getattr(layer, name).task_adapters[task]
                        source = getattr(shared.layers[number], name).adapter
                    target.load_state_dict(source.state_dict())
        found = own(batch, dtype=torch.float64, dropout=stream)
        expected = shared(batch, dtype=torch.float64, dropout=stream)
    assert distance(found, expected) < 1e-12


def test_adapters_of_one_task_start_at_the_pretrained_model(tiny_bert: Path):
    start = adapted_by_task(tiny_bert, trained=False)
    with torch.no_grad():
        plain = load_encoder(tiny_bert, dtype=torch.float64)(TASKS, dtype=torch.float64)
        assert distance(start(TASKS, dtype=torch.float64), plain) < 1e-13


@pytest.mark.parametrize("wrong", [merge, unmerge])
def test_adapters_of_one_task_cannot_be_merged(tiny_bert: Path, wrong):
    encoder = adapted_by_task(tiny_bert)
    with pytest.raises(ValueError, match=r"lora\.per_task: adapters of one task each cannot be merged"):
        wrong(encoder)
    assert list(adapted_weights(encoder)) == []


def test_adapters_of_one_task_need_tasks(tiny_bert: Path):
    with pytest.raises(ValueError, match=r"lora\.per_task: no tasks are named"):
        add_lora(load_encoder(tiny_bert), LoraConfig(per_task=True))


# ---- configuration ----


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        ("all", 3, [0, 1, 2]),
        ("first4", 6, [0, 1, 2, 3]),
        ("mid4", 6, [1, 2, 3, 4]),
        ("last4", 6, [2, 3, 4, 5]),
        ("first4", 12, [0, 1, 2, 3]),
        ("mid4", 12, [4, 5, 6, 7]),
        ("last4", 12, [8, 9, 10, 11]),
        ("mid4", 4, [0, 1, 2, 3]),
        ([5, 0], 6, [0, 5]),
    ],
)
def test_layers(layers, count: int, expected: list[int]):
    assert LoraConfig(layers=layers).layer_numbers(count) == expected


@pytest.mark.parametrize(
    ("layers", "count", "message"),
    [
        ("last4", 3, "lora.layers: last4 needs four layers, the encoder has 3"),
        ("middle", 6, "lora.layers: unknown group 'middle'; possible: all, first4, mid4, last4 or a list"),
        ([6], 6, "lora.layers: no layer 6; the encoder has layers 0 to 5"),
        ([-1], 6, "lora.layers: no layer -1"),
        ([], 6, "lora.layers: expected different layers"),
        ([1, 1], 6, "lora.layers: expected different layers"),
    ],
)
def test_impossible_layers(layers, count: int, message: str):
    with pytest.raises(ConfigError) as error:
        LoraConfig(layers=layers).layer_numbers(count)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank", 0, "lora.rank: expected 1 to 4096, found 0"),
        ("alpha", 0.0, "lora.alpha: expected a number above 0, found 0.0"),
        ("dropout", 1.0, "lora.dropout: expected a probability"),
        ("projections", [], "lora.projections: the list is empty"),
        (
            "projections",
            ["querry"],
            "lora.projections: unknown projection 'querry'; possible: query, key, value",
        ),
        ("projections", ["key", "key"], "lora.projections: a projection is named twice"),
    ],
)
def test_impossible_values_are_named(field: str, value, message: str):
    with pytest.raises(ConfigError) as error:
        LoraConfig(**{field: value})
    assert message in str(error.value)

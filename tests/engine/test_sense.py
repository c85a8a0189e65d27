"""Combinations that would run and mean nothing are refused before the run begins; all presets can begin."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.configs import config_of
from support.tiny_bert import write_tiny_bert

from mtbert.config import TrainConfig
from mtbert.engine.assembly import Parts, assemble
from mtbert.errors import ConfigError
from mtbert.evaluation.published import read_published

Build = Callable[..., Parts]

DRY = "model: {dropout: {embedding: 0, attention: 0, hidden: 0}}"
DRY_HEAD = "sst: {head: {dropout: 0}}"
COSINE = "sts: {loss: {weight: 0}, head: {pair: [cosine], pooling: cls}}"
STILL = "smart: {tasks: [sst], noise_std: 0}"


@pytest.fixture
def build(tiny_bert: Path, tmp_path: Path) -> Build:
    """All that a run of one epoch of four steps is built from, with the settings of some lines of YAML."""

    def built(*lines: str) -> Parts:
        values = {"epochs": 1, "curriculum": {"epoch_length": 4}, "model": {}} | {
            task: {"batch_size": 6, "max_length": 64} for task in ("sst", "para", "sts")
        }
        for line in lines:
            for name, value in yaml.safe_load(line).items():
                values[name] = values.get(name, {}) | value if isinstance(value, dict) else value
        values["model"] = {"pretrained": str(tiny_bert)} | values["model"]
        return assemble(dataclasses.replace(config_of(values), cache=str(tmp_path)))

    return built


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["smart: {tasks: [sst], noise_std: 0, masks: same}"],
            "smart.noise_std: found 0, and smart.masks is same: the passes of sst would not differ * possible: above 0,"
            " or smart.masks fresh with dropout",
        ),
        (
            [STILL, DRY, DRY_HEAD],
            "smart.noise_std: found 0, and nothing drops: * possible: above 0, or dropout",
        ),
        (
            ["smart: {tasks: [sst], epsilon: 0, step_size: 0, masks: same}"],
            "smart.epsilon: found 0, and smart.masks is same",
        ),
        (
            ["model: {frozen_dropout: false}"],
            "model.frozen_dropout: false would have no effect, because mode full trains in the first layer or below it;"
            " possible: model.trained_layers below",
        ),
        (
            ["mode: last-linear-layer", "model: {frozen_dropout: false}"],
            "model.frozen_dropout: * a wholly frozen encoder never drops",
        ),
        (
            [
                "model: {frozen_dropout: false, trained_layers: 1, dropout: {embedding: 0, attention: 0, hidden: 0}}",
            ],
            "model.frozen_dropout: * model.dropout is 0 everywhere",
        ),
        (["model: {trained_layers: 3}"], "model.trained_layers: expected 1 to 2, the layers of * found 3"),
        # Its head has no layer whose input could be dropped.
        (["smart: {tasks: [sst, sts], noise_std: 0}", DRY, COSINE], "smart.noise_std: * the passes of sts"),
        (
            ["surgery: {method: pcgrad}", "tasks: [sst, sts]", COSINE],
            "surgery.method: pcgrad needs several tasks with a loss, found sst of sst, sts; possible: sum",
        ),
        (
            ["surgery: {measure: true}", "tasks: [sst, sts]", COSINE],
            "surgery.measure: true needs several tasks with a loss, found sst of sst, sts; possible: false",
        ),
        # Learned weights are those of the tasks' own losses.
        (
            ["surgery: {method: uncertainty}", "tasks: [sst, sts]", COSINE, "simcse: {tasks: [sts]}"],
            "surgery.method: uncertainty needs several tasks with a loss, found sst of",
        ),
        (
            [f"{task}: {{loss: {{weight: 0}}}}" for task in ("sst", "para", "sts")]
            + ["smart: {tasks: [sst]}"],
            "sst.loss.weight, para.loss.weight, sts.loss.weight: found 0, * possible: above 0 for one of them, or a"
            " task in simcse.tasks, mnrl.tasks, cosine_embedding.tasks, triplet.tasks",
        ),
        (
            ["curriculum: {mixing: dynamic}", *(f"{t}: {{batch_size: 1}}" for t in ("sst", "para", "sts"))],
            "curriculum.mixing: dynamic * found sst.batch_size 1, para.batch_size 1, sts.batch_size 1; possible",
        ),
        # One task alone cannot give rows to another.
        (
            ["curriculum: {mixing: dynamic}", *(f"{t}: {{batch_size: 1}}" for t in ("sst", "para"))],
            "curriculum.mixing: dynamic * sts.batch_size 6; possible: parallel, or larger batches",
        ),
        (
            ["unfreezing: {gradual: true}"],
            "unfreezing.epochs_per_layer: with 1 * after 2 epochs, but training has 1; possible: below 0.5, or epochs"
            " above 2",
        ),
        (
            ["schedule: {warmup: 5}"],
            "schedule.warmup: found 5 steps, but the run has 4: * possible: up to 4, or a share",
        ),
        (
            ["mixout: {p: 0.1}", "mode: lora"],
            "mixout.p: found 0.1, but mode lora trains no pretrained matrix; possible: 0, or mode full",
        ),
        (
            ["sst: {loss: {class_weights: [0, 0, 0, 0, 0]}}"],
            "sst.loss.class_weights: found [0, 0, 0, 0, 0], which is 0 for every class",
        ),
        (
            ["para: {loss: {weight: 0}, head: {pair: [dot], tower_layers: 1}}"],
            "para.loss.weight: with 0 nothing trains the head * possible: above 0, or for pairs a head that needs no",
        ),
    ],
)
def test_refused(build: Build, lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="^" + ".*".join(map(re.escape, message.split(" * ")))):
        build(*lines)


@pytest.mark.parametrize(
    "lines",
    [
        [STILL],  # the masks differ
        [STILL, DRY],  # those of the head do
        [STILL, DRY, DRY_HEAD, "mode: lora"],  # those of the adapters do
        [STILL, DRY, "sst: {head: {dropout: 0, hidden_layers: 1, activation: rrelu}}"],
        ["smart: {tasks: [sst], epsilon: 0, masks: same, projection: reference}"],
        ["surgery: {method: pcgrad}", "tasks: [sst, sts]", COSINE, "simcse: {tasks: [sts]}"],
        ["surgery: {method: pcgrad}", "tasks: [sst, sts]", COSINE, "smart: {tasks: [sts]}"],
        ["surgery: {method: uncertainty}", COSINE],
        ["curriculum: {mixing: dynamic}", "sst: {batch_size: 1}"],
        ["unfreezing: {gradual: true, epochs_per_layer: 0.4}"],
        ["schedule: {warmup: 4}"],
        ["schedule: {warmup: 0.9}"],
        ["para: {loss: {weight: 0}, head: {pair: [dot]}}"],  # as drawn it compares the pooled rows
    ],
)
def test_accepted(build: Build, lines: list[str]) -> None:
    build(*lines)


@pytest.mark.parametrize("pooling", ["pooler", "cls"])
def test_measuring_the_embeddings_changes_nothing_of_the_training(
    build: Build, monkeypatch: pytest.MonkeyPatch, pooling: str
) -> None:
    """The probe reads sentences of sts, but one task alone trains the pooler, or none."""
    lines = [
        f"simcse: {{tasks: [sst], pooling: {pooling}}}",
        "surgery: {method: upgrad}",
        "max_tokens: 2048",
    ]
    probed = build(*lines)
    assert probed.evaluator.quality is not None
    monkeypatch.setattr("mtbert.engine.assembly.sentence_quality", lambda *arguments: None)
    plain = build(*lines)
    pooler = [p.requires_grad for n, p in probed.model.named_parameters() if "pooler" in n]
    assert pooler == [pooling == "pooler"] * 2
    assert [n for n, _ in probed.model.shared_parameters()] == [n for n, _ in plain.model.shared_parameters()]
    grams = [p.train_step.accumulate(p.curriculum.next(), 0).gradients.gram for p in (probed, plain)]
    assert grams[0].equal(grams[1])
    gradients = [{n: p.grad for n, p in parts.model.named_parameters()} for parts in (probed, plain)]
    for name, gradient in gradients[0].items():
        assert gradient is gradients[1][name] is None or gradient.equal(gradients[1][name]), name
    assert probed.evaluator.quality().uniformity < 0


# ---- presets ----

PRESETS = [row for row in read_published().rows.values() if row.impossible is None]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for 48 heads, deep enough for four layers out of more."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert"), layers=5, hidden=96, heads=12)


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_every_preset_of_the_papers_can_begin(bert: Path, row) -> None:
    config: TrainConfig = config_of(yaml.safe_load(row.preset.read_text(encoding="utf-8")))
    config.model.pretrained = str(bert)
    for task in config.task.values():
        task.max_length = 64
    assemble(dataclasses.replace(config, cache=str(bert), max_tokens=1024))

"""The papers' presets: complete, valid, and each kind of them trains."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.assembly import assemble
from support.tiny_bert import write_tiny_bert

from mtbert.cli import parse_train, preset_path, presets
from mtbert.config import TrainConfig, to_dict
from mtbert.curriculum import build_curriculum
from mtbert.engine.reproduction_cost import shortened
from mtbert.evaluation.published import FOLDER, ROWS_FILE, read_published
from mtbert.evaluation.reproduction_schedule import Schedule
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import TASKS

PUBLISHED = read_published()
RUNNABLE = [row for row in PUBLISHED.rows.values() if row.impossible is None]


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def build(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass of a mapping; a TypeError for a key that it does not have."""
    hints = _hints(kind)
    nested = {
        name: build(hints[name], value) if dataclasses.is_dataclass(hints.get(name)) else value
        for name, value in values.items()
    }
    return kind(**nested)


def config_of(name: str) -> TrainConfig:
    """The preset without the parser, which takes half a second."""
    return copy.deepcopy(_config_of(name))


@functools.cache
def _config_of(name: str) -> TrainConfig:
    values = yaml.safe_load(preset_path(name).read_text(encoding="utf-8"))
    tasks = {task: build(TaskConfig, values.pop(task)) for task in TASKS if task in values}
    return build(TrainConfig, values | {"task": tasks})


def settings(name: str) -> dict[str, Any]:
    return to_dict(config_of(name))


def test_presets_and_rows_have_the_same_names() -> None:
    files = {file.stem for file in FOLDER.glob("*.yaml") if file.name != ROWS_FILE}
    assert files == {row.name for row in RUNNABLE}
    assert files <= set(presets())
    assert not files & set(presets(papers=False))
    assert all(row.name.startswith(f"{row.paper}-") for row in PUBLISHED.rows.values())


def test_every_preset_says_what_was_published_and_how_it_is_read() -> None:
    for row in RUNNABLE:
        comment = [
            line for line in row.preset.read_text(encoding="utf-8").splitlines() if line.startswith("#")
        ]
        text = " ".join(line.removeprefix("# ") for line in comment)
        assert PUBLISHED.titles[row.paper].split()[0] in comment[0]
        assert "Reading: " in text
        for value in [*row.figures.values(), *([] if row.score is None else [row.score])]:
            assert f"{value:.4f}".rstrip("0").rstrip(".").replace("0.", ".", 1) in text or value == 0, (
                row.name
            )


@pytest.mark.parametrize("row", [row.name for row in RUNNABLE])
def test_every_preset_is_a_valid_configuration(row: str) -> None:
    config = config_of(row)
    assert config.model.pretrained == "bert-base-uncased"
    assert Schedule.of(to_dict(config)) == PUBLISHED.rows[row].schedule


@pytest.mark.parametrize("row", [row.name for row in RUNNABLE])
def test_surgery_has_gradients_that_can_conflict(row: str) -> None:
    config = config_of(row)
    if config.surgery.method != "sum":
        assert config.mode != "last-linear-layer"
        assert config.curriculum.mixing in ("parallel", "dynamic")
        assert len(config.tasks) > 1


def test_a_published_figure_stands_at_one_row() -> None:
    for paper in PUBLISHED.titles:
        found = [
            (tuple(row.figures.items()), row.score)
            for row in PUBLISHED.rows.values()
            if row.paper == paper and len(row.figures) > 1
        ]
        assert len(found) == len(set(found))


def test_smart_weighs_as_much_beside_a_task_as_the_paper_says() -> None:
    """Equation 2: L + 5 R for each task; a common factor is left to equation 1."""
    config = config_of("chan-r6")
    for task in config.smart.tasks:
        assert config.smart.weight / config.task[task].loss.weight == pytest.approx(5, rel=1e-3)
    assert config.task["sts"].loss.weight / 25 == pytest.approx(config.task["sst"].loss.weight, rel=1e-3)


@pytest.mark.parametrize("row", ["chan-r5", "luo-lora-r4", "peng-run-292"])
def test_the_parser_reads_the_same(row: str) -> None:
    assert parse_train(["--preset", row]) == config_of(row)


def test_rows_share_a_run_exactly_when_their_settings_are_the_same() -> None:
    first: dict[str, str] = {}
    for row in RUNNABLE:
        key = json.dumps(settings(row.run), sort_keys=True)
        assert settings(row.name) == settings(row.run)
        assert first.setdefault(key, row.run) == row.run


def test_published_scores_follow_their_formulas() -> None:
    """The rows that fit neither formula are the two that the papers' page names."""
    rows = PUBLISHED.rows.values()
    assert [row.name for row in rows if row.matches_neither] == ["peng-no-attention", "peng-attention"]
    for row in rows:
        if row.score is not None and row.recomputed is not None and not row.matches_neither:
            assert row.score == pytest.approx(row.recomputed, abs=0.0011), row.name


def test_tables_of_epochs_agree_with_their_rows() -> None:
    for row in PUBLISHED.rows.values():
        if row.by_epoch:
            best = max(range(10), key=lambda place: row.by_epoch["overall"][place])
            assert row.score == row.by_epoch["overall"][best]
            assert all(row.figures[task] == row.by_epoch[task][best] for task in row.figures)
            for sst, para, sts, overall in zip(
                *(row.by_epoch[name] for name in ("sst", "para", "sts", "overall")), strict=True
            ):
                assert overall == pytest.approx((sst + para + (sts + 1) / 2) / 3, abs=2e-4)


def features(config: TrainConfig) -> set[str]:
    """What decides which code a preset runs."""
    found = {config.mode, config.curriculum.mixing, f"{config.surgery.method} {config.surgery.variant}"}
    found |= {"start"} if config.curriculum.start else set()
    for name, task in config.task.items():
        head = task.head
        found |= {
            f"{name} {head.pooling} {head.pair}",
            f"{name} {head.activation}",
            f"{name} {task.sampling}",
        }
        found |= {f"{name} towers {head.tower_layers}", f"{name} weighs {bool(task.loss.weight)}"}
    for name in ("simcse", "mnrl", "cosine_embedding", "smart"):
        group = getattr(config, name)
        found |= {f"{name} {group.tasks} {group.pooling if hasattr(group, 'pooling') else ''}"}
    found |= {config.cosine_embedding.labels, f"final margin {config.cosine_embedding.final_margin}"}
    found |= {
        f"{config.model.attention_heads} heads",
        str(config.model.extra_hidden),
        f"{config.model.dropout}",
    }
    found |= (
        {f"lora {config.model.lora.layers} {config.model.lora.projections}"}
        if config.mode == "lora"
        else set()
    )
    return found


def covering() -> list[str]:
    """Few presets that have every feature between them: always the one that adds most."""
    left = {row.run: features(config_of(row.run)) for row in RUNNABLE}
    chosen: list[str] = []
    while any(left.values()):
        best = max(left, key=lambda name: len(left[name]))
        chosen.append(best)
        seen = left[best]
        left = {name: found - seen for name, found in left.items()}
    return chosen


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for 48 heads, deep enough for four layers out of more."""
    folder = tmp_path_factory.mktemp("bert")
    return write_tiny_bert(folder, layers=5, hidden=96, heads=12)


@pytest.mark.parametrize("row", covering())
def test_every_kind_of_preset_trains_a_step(row: str, bert: Path) -> None:
    config = shortened(config_of(row), 0.1)
    config.model.pretrained = str(bert)
    for task in config.task.values():
        task.max_length, task.batch_size = 64, min(task.batch_size, 8)
    config = dataclasses.replace(config, cache=str(bert), max_tokens=1024)
    built = assemble(config, dtype=torch.float32, rows=40)
    curriculum = build_curriculum(
        built.batches,
        config.curriculum,
        sizes={name: len(batches.examples) for name, batches in built.batches.items()},
        seed=0,
        epochs=config.epochs,
    )
    before = {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}
    result = built.step(curriculum.next(), 0, 0.0)
    assert torch.isfinite(result.total)
    moved = [
        name for name, p in built.model.named_parameters() if name in before and not p.equal(before[name])
    ]
    assert moved

"""How long a row trains and which rows it sees, against curricula that are walked through."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from mtbert.curriculum import CurriculumConfig, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.evaluation.published import read_published
from mtbert.evaluation.reproduction_schedule import Schedule

PUBLISHED = read_published()
COURSE = PUBLISHED.train


def schedule(name: str, **changes: Any) -> Schedule:
    return dataclasses.replace(PUBLISHED.rows[name].schedule, **changes)


@pytest.mark.parametrize(
    ("mixing", "length", "epochs", "start"),
    [
        ("parallel", "smallest", 3.0, {}),
        ("parallel", "smallest", 1.5, {}),
        ("parallel", "largest", 1.0, {}),
        ("parallel", "largest", 0.4, {}),
        ("parallel", 5, 2.0, {"para": 1}),
        ("sequential", "largest", 1.0, {}),
        ("sequential", "smallest", 2.0, {}),
        ("sequential", 3, 2.0, {"para": 1}),
    ],
)
def test_different_rows_are_those_that_a_curriculum_draws(
    mixing: str, length: str | int, epochs: float, start: dict[str, int]
) -> None:
    sizes, batch = {"sst": 80, "para": 400, "sts": 64}, 8
    settings: dict[str, Any] = {"tasks": list(sizes), "epochs": epochs}
    settings["curriculum"] = {"mixing": mixing, "epoch_length": length, "start": start}
    found = Schedule.of(settings | {name: {"batch_size": batch} for name in sizes})
    curriculum = build_curriculum(
        {name: TaskBatches(np.ones(size), batch, 0, name) for name, size in sizes.items()},
        CurriculumConfig(**settings["curriculum"]),
        sizes=sizes,
        seed=0,
        epochs=epochs,
    )
    drawn: dict[str, set[int]] = {name: set() for name in sizes}
    for _ in range(curriculum.total_steps):
        for name, indices in curriculum.next().items():
            drawn[name] |= set(indices.tolist())
    assert {name: found.distinct(name, sizes) for name in sizes} == {n: len(d) for n, d in drawn.items()}


def test_quora_pairs_of_the_papers() -> None:
    """Chan: 10 epochs of 378 batches of 16, or 6 epochs; one pass over all comes first in R5; Luo's baseline trains on
    none, all others on all."""
    pairs = {
        row.name: row.schedule.distinct("para", COURSE)
        for row in PUBLISHED.rows.values()
        if row.impossible is None and "para" in row.schedule.batch_sizes
    }
    assert pairs["chan-r4"] == pairs["chan-r4-para"] == 10 * 378 * 16 == 60_480
    assert pairs["chan-r9-lr1e-6"] == 6 * 378 * 16
    assert pairs["crichton-cosine"] == 10 * 755 * 8
    assert pairs["luo-baseline"] == 0
    for name in ("chan-r5", "crichton-sequential", "delacruz-full", "luo-cosine", "peng-best"):
        assert pairs[name] == 141_498


def test_a_first_pass_begins_with_the_rows_that_follow() -> None:
    short = schedule("chan-r5", epochs=1.0, first_passes=0.1)
    assert short.distinct("para", COURSE) == round(141_498 * 0.1)
    assert schedule("chan-r5", epochs=5.0, first_passes=0.1).distinct("para", COURSE) == 5 * 378 * 16


def test_epochs_in_words() -> None:
    def text(name: str, **changes: Any) -> str:
        return schedule(name, **changes).text(PUBLISHED.rows[name].schedule)

    assert text("chan-r4") == "10 of 10"
    assert text("chan-r4", epochs=500 / 378) == "1.32 of 10"
    assert text("delacruz-full", epochs=1.0, epoch_length=100) == "1 of 10, each cut to 100 batches a task"
    assert text("chan-r5", epochs=1.0, first_passes=0.1) == (
        "1 of 10, before them 0.1 of 1 passes over para alone"
    )
    assert text("peng-run-292", epochs=2.0, start={"sst": 1}) == (
        "2 of 25, sst joins after epoch 1 (paper: joins after epoch 10)"
    )
    assert text("peng-run-292", epochs=1.0, start={}) == (
        "1 of 25, sst takes part from the start (paper: joins after epoch 10)"
    )


def test_what_was_changed() -> None:
    def changed(name: str, **changes: Any) -> str | None:
        return schedule(name, **changes).changed(PUBLISHED.rows[name].schedule)

    assert changed("chan-r4") is None
    assert changed("peng-run-292") is None
    assert changed("chan-r4", epochs=1.0) == "shortened (epochs: 1 of 10)"
    assert changed("chan-r4", epochs=20.0) == "lengthened (epochs: 20 of 10)"
    assert str(changed("chan-r5", first_passes=0.5)).startswith(
        "shortened (epochs: 10 of 10, before them 0.5"
    )
    assert schedule("peng-run-292", start={}).lost_starts(schedule("peng-run-292")) == ["sst"]
    assert schedule("peng-run-292", start={"sst": 1}).lost_starts(schedule("peng-run-292")) == []


def test_other_learning_rates_are_told() -> None:
    paper = schedule("chan-r4")
    assert paper.changed(paper) is None
    faster = schedule("chan-r4", lr=1e-4)
    assert faster.changed(paper) == "changed (epochs: 10 of 10, learning rate 0.0001 (paper: 1e-05))"
    both = schedule("chan-r4", lr=1e-4, epochs=2.0)
    assert both.changed(paper) == "shortened (epochs: 2 of 10, learning rate 0.0001 (paper: 1e-05))"

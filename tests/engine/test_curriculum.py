"""The exact schedule of each curriculum, and that its state continues it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mtbert.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError

SIZES = {"sst": 10, "para": 25, "sts": 7}


def batches() -> dict[str, TaskBatches]:
    return {name: TaskBatches(np.arange(1, size + 1), 5, 0, name) for name, size in SIZES.items()}


def build(mixing: str, epoch_length: object) -> Curriculum:
    return build_curriculum(batches(), CurriculumConfig(mixing, epoch_length))  # type: ignore[arg-type]


@pytest.mark.parametrize(("epoch_length", "steps"), [("smallest", 2), ("largest", 5), (3, 3)])
def test_parallel_holds_every_task_in_every_step(epoch_length: object, steps: int) -> None:
    curriculum = build("parallel", epoch_length)
    assert curriculum.steps_per_epoch == steps
    assert list(curriculum.next()) == ["sst", "para", "sts"]


def test_round_robin_takes_turns_in_the_order_of_the_tasks() -> None:
    curriculum = build("round-robin", "largest")
    assert curriculum.steps_per_epoch == 15
    turns = [list(curriculum.next()) for _ in range(6)]
    assert turns == [["sst"], ["para"], ["sts"]] * 2


@pytest.mark.parametrize("mixing", ["parallel", "round-robin"])
def test_every_example_of_a_cycle_is_seen_exactly_once(mixing: str) -> None:
    curriculum = build(mixing, "largest")
    seen: dict[str, Counter[int]] = {name: Counter() for name in SIZES}
    for _ in range(2 * curriculum.steps_per_epoch):
        for name, examples in curriculum.next().items():
            seen[name].update(examples.tolist())
    assert set(seen["para"].values()) == {2}
    assert set(seen["para"]) == set(range(25))
    assert set(seen["sst"].values()) == {5}, "10 batches of 5 cycles"
    assert set(seen["sts"].values()) == {5}


def test_smallest_epochs_go_on_through_the_larger_tasks() -> None:
    curriculum = build("parallel", "smallest")
    seen: Counter[int] = Counter()
    for _ in range(5):
        seen.update(curriculum.next()["para"].tolist())
    assert seen == Counter(range(25)), "nothing of the largest task stays unseen"


@pytest.mark.parametrize("mixing", ["parallel", "round-robin"])
def test_a_restored_curriculum_continues(mixing: str) -> None:
    one, other = build(mixing, "largest"), build(mixing, "largest")
    for _ in range(7):
        one.next()
    other.restore(one.state())
    for _ in range(9):
        a, b = one.next(), other.next()
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[k], b[k]) for k in a)


def test_a_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match="tasks"):
        build("parallel", "largest").restore({"sst": 1})


def test_an_epoch_of_no_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"curriculum\.epoch_length"):
        CurriculumConfig(epoch_length=0)

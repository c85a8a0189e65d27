"""What holds for every curriculum: cycles, states that continue it, and settings that cannot work."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from mtbert.curriculum import Curriculum, CurriculumConfig, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError

SIZES = {"sst": 10, "para": 25, "sts": 7}
MIXINGS = ["parallel", "round-robin", "sequential", "proportional", "sqrt", "annealed", "dynamic"]


def batches() -> dict[str, TaskBatches]:
    return {name: TaskBatches(np.arange(1, size + 1), 5, 0, name) for name, size in SIZES.items()}


def build(
    mixing: str, epoch_length: object = "largest", *, seed: int = 0, epochs: float = 4, **more: object
) -> Curriculum:
    config = CurriculumConfig(mixing, epoch_length, **more)  # type: ignore[arg-type]
    return build_curriculum(batches(), config, sizes=SIZES, seed=seed, epochs=epochs)


def taken(curriculum: Curriculum, steps: int) -> dict[str, list[int]]:
    """The examples of every task in their order over the next steps."""
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    for _ in range(steps):
        for name, examples in curriculum.next().items():
            assert examples.dtype == np.int64
            found[name] += examples.tolist()
    return found


@pytest.mark.parametrize("epoch_length", ["smallest", "largest", 3])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_cycles_hold_every_example_once_and_nothing_stays_unseen(mixing: str, epoch_length: object) -> None:
    curriculum = build(mixing, epoch_length)
    found: dict[str, list[int]] = {name: [] for name in SIZES}
    for number in range(12):
        for name, examples in taken(curriculum, 10).items():
            found[name] += examples
        curriculum.observe({"sst": 0.1 * number, "para": 0.8, "sts": -0.2})
    for name, examples in found.items():
        size = SIZES[name]
        assert len(examples) > 2 * size
        for start in range(0, len(examples) - size + 1, size):
            assert sorted(examples[start : start + size]) == list(range(size))


def test_round_robin_cycles_every_task_alike() -> None:
    curriculum = build("round-robin")
    seen = {name: Counter(examples) for name, examples in taken(curriculum, 30).items()}
    assert set(seen["para"].values()) == {2}, "10 batches of 25 examples, 5 at a time"
    assert set(seen["sst"].values()) == {5}
    assert set(seen["sts"].values()) == {5}


@pytest.mark.parametrize("start", [{}, {"sst": 1, "sts": 2}])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_restored_curriculum_continues(mixing: str, start: dict[str, int]) -> None:
    one, other = build(mixing, start=start), build(mixing, start=start)
    for number in range(7):
        one.next()
        if number == 3:
            one.observe({"sst": 0.3, "para": 0.8123, "sts": 0.1})
    other.restore(json.loads(json.dumps(one.state())))
    for number in range(40):
        a, b = one.next(), other.next()
        assert list(a) == list(b)
        assert all(np.array_equal(a[k], b[k]) for k in a)
        if number == 20:
            for curriculum in (one, other):
                curriculum.observe({"sst": 0.9, "para": 0.5, "sts": 0.7})
    assert one.state() == other.state()


@pytest.mark.parametrize("mixing", MIXINGS)
def test_epochs_follow_the_steps(mixing: str) -> None:
    curriculum = build(mixing, start={"para": 2}, epochs=4.5)
    lengths = [curriculum.epoch_steps(epoch) for epoch in range(5)]
    ends = [sum(lengths[: epoch + 1]) for epoch in range(5)]
    assert lengths[2] == lengths[3] == curriculum.steps_per_epoch
    assert curriculum.total_steps == round(sum(lengths[:4]) + 0.5 * lengths[4])
    assert [step for step in range(1, ends[-1] + 1) if curriculum.ends_epoch(step)] == ends
    before = -1.0
    for step in range(ends[-1]):
        epoch = curriculum.epoch_of(step)
        assert before < epoch
        assert int(epoch) == sum(end <= step for end in ends)
        before = epoch
    assert [curriculum.epoch_of(end) for end in ends] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("epochs", "steps"), [(3, 15), (0.5, 2), (1.5, 8), (0.01, 1)])
def test_a_part_of_an_epoch_is_rounded_to_steps(epochs: float, steps: int) -> None:
    assert build("parallel", epochs=epochs).total_steps == steps


@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_task_is_absent_before_its_start(mixing: str) -> None:
    curriculum = build(mixing, start={"sst": 2, "sts": 1})
    seen: list[set[str]] = []
    for epoch in range(4):
        seen.append(set())
        for _ in range(curriculum.epoch_steps(epoch)):
            seen[-1] |= set(curriculum.next())
    assert seen[0] == {"para"}
    assert seen[1] <= {"para", "sts"}
    if mixing in ("parallel", "round-robin", "sequential", "dynamic"):
        assert seen[1:] == [{"para", "sts"}, set(SIZES), set(SIZES)]


def test_the_order_of_turns_and_rows() -> None:
    order = ["sts", "sst", "para"]
    assert list(build("parallel", order=order).next()) == order
    turns = build("round-robin", order=order)
    assert [list(turns.next()) for _ in range(4)] == [["sts"], ["sst"], ["para"], ["sts"]]


def test_observing_changes_nothing_but_the_dynamic_one() -> None:
    for mixing in MIXINGS:
        plain, watched = build(mixing), build(mixing)
        watched.observe({"sst": 0.1, "para": 0.9, "sts": 0.5})
        same = taken(plain, 20) == taken(watched, 20)
        assert same == (mixing != "dynamic")


# ---- settings that cannot work ----


def test_a_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(ConfigError, match="tasks"):
        build("parallel").restore({"step": 1, "taken": {"sst": 1}})


def test_an_epoch_of_no_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^curriculum\.epoch_length"):
        CurriculumConfig(epoch_length=0)


def test_no_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^tasks: expected at least one"):
        build_curriculum({}, CurriculumConfig(), sizes={}, seed=0, epochs=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"order": ["sst", "para", "mnli"]}, r"^curriculum\.order: 'mnli' .* possible: sst, para, sts"),
        (
            {"order": ["sst", "para"]},
            r"^curriculum\.order: expected every task .*\(sst, para, sts\), found sst, para",
        ),
        ({"order": ["sst", "para", "sts", "sst"]}, r"^curriculum\.order: expected every task .* once"),
        ({"start": {"mnli": 1}}, r"^curriculum\.start: 'mnli' .* possible: sst, para, sts"),
        ({"start": {"sst": 4}}, r"^curriculum\.start: sst .* 4 epochs .* possible: 0 to 3"),
        ({"start": {"sst": 1}, "epochs": 1}, r"^curriculum\.start: sst .* training has 1; possible: 0$"),
        ({"start": {"sst": 1, "para": 2, "sts": 1}}, r"^curriculum\.start: no task .* sst, para, sts"),
        ({"start": {"sst": -1}}, r"^curriculum\.start: expected at least 0 epochs, found -1 for sst"),
    ],
)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_impossible_settings_name_their_field(mixing: str, more: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(mixing, **more)  # type: ignore[arg-type]

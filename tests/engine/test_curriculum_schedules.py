"""The exact schedule of each curriculum, by hand for small cases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mtbert.curriculum import Annealed, Curriculum, CurriculumConfig, Dynamic, build_curriculum
from mtbert.data.batching import TaskBatches

SIZES = {"sst": 10, "para": 25, "sts": 7}


def build(
    mixing: str,
    epoch_length: object = "largest",
    *,
    sizes: dict[str, int] = SIZES,
    batch_sizes: tuple[int, ...] = (5, 5, 5),
    seed: int = 0,
    epochs: float = 5,
    **more: object,
) -> Curriculum:
    batches = {
        name: TaskBatches(np.arange(1, size + 1), batch_size, 0, name)
        for (name, size), batch_size in zip(sizes.items(), batch_sizes, strict=True)
    }
    config = CurriculumConfig(mixing, epoch_length, **more)  # type: ignore[arg-type]
    return build_curriculum(batches, config, sizes=sizes, seed=seed, epochs=epochs)


def schedule(curriculum: Curriculum, steps: int) -> str:
    """The tasks of the next steps: s(st), p(ara), t (sts); the tasks of one step stand together."""
    letters = {"sst": "s", "para": "p", "sts": "t"}
    return " ".join("".join(letters[task] for task in curriculum.next()) for _ in range(steps))


@pytest.mark.parametrize(("epoch_length", "steps"), [("smallest", 2), ("largest", 5), (3, 3)])
def test_parallel(epoch_length: object, steps: int) -> None:
    curriculum = build("parallel", epoch_length)
    assert curriculum.steps_per_epoch == steps
    assert schedule(curriculum, 3) == "spt spt spt"


def test_parallel_with_a_late_task() -> None:
    curriculum = build("parallel", "smallest", start={"para": 2})
    assert schedule(curriculum, 6) == "st st st st spt spt"


@pytest.mark.parametrize(("epoch_length", "steps"), [("smallest", 6), ("largest", 15), (3, 9)])
def test_round_robin(epoch_length: object, steps: int) -> None:
    curriculum = build("round-robin", epoch_length)
    assert curriculum.steps_per_epoch == steps
    assert schedule(curriculum, 7) == "s p t s p t s"


def test_round_robin_with_a_late_task() -> None:
    curriculum = build("round-robin", 2, start={"sst": 1})
    assert schedule(curriculum, 10) == "p t p t s p t s p t"
    assert [curriculum.ends_epoch(step) for step in (4, 6, 10)] == [True, False, True]


def test_sequential_has_whole_passes_in_any_order() -> None:
    curriculum = build("sequential", order=["para", "sts", "sst"])
    assert curriculum.steps_per_epoch == 9
    assert schedule(curriculum, 18) == "p p p p p t t s s p p p p p t t s s"


def test_every_epoch_of_sequential_holds_every_example_once() -> None:
    curriculum = build("sequential")
    for _ in range(3):
        seen: dict[str, Counter[int]] = {name: Counter() for name in SIZES}
        for _ in range(curriculum.steps_per_epoch):
            for name, examples in curriculum.next().items():
                seen[name].update(examples.tolist())
        assert seen == {name: Counter(range(size)) for name, size in SIZES.items()}


def test_sequential_cut_to_the_smallest_goes_on_where_it_was_cut() -> None:
    curriculum = build("sequential", "smallest")
    assert schedule(curriculum, 12) == "s s p p t t s s p p t t"
    curriculum = build("sequential", "smallest")
    para: list[int] = []
    for _ in range(15):
        para += curriculum.next().get("para", np.zeros(0, dtype=np.int64)).tolist()
    assert sorted(para[:25]) == list(range(25)), "the passes of three epochs are one of the task's cycles"


def test_sequential_with_a_late_task_has_shorter_epochs_before_it() -> None:
    """Peng, Yuan and Wang, section 5.7: sentiment starts late and then joins the others."""
    curriculum = build("sequential", order=["para", "sts", "sst"], start={"sst": 1}, epochs=2)
    assert schedule(curriculum, 16) == "p p p p p t t p p p p p t t s s"
    assert curriculum.total_steps == 16
    assert curriculum.steps_per_epoch == 9
    assert curriculum.epoch_of(3) == 3 / 7
    assert curriculum.epoch_of(10) == 1 + 3 / 9


# ---- drawn tasks ----


def shares(curriculum: Curriculum, epoch: int, steps: int = 4000) -> dict[str, float]:
    drawn = Counter(curriculum.tasks_of(epoch, place)[0] for place in range(steps))
    return {task: count / steps for task, count in drawn.items()}


LARGE = {"sst": 8544, "para": 22757, "sts": 6040}
EXPECTED = {  # size ** alpha over its sum, to four places
    1.0: {"sst": 0.2288, "para": 0.6094, "sts": 0.1618},
    0.8: {"sst": 0.2533, "para": 0.5547, "sts": 0.1920},
    0.5: {"sst": 0.2880, "para": 0.4699, "sts": 0.2421},
    0.2: {"sst": 0.3175, "para": 0.3862, "sts": 0.2962},
}


@pytest.mark.parametrize(
    ("mixing", "epoch", "alpha"),
    [
        ("proportional", 0, 1.0),
        ("proportional", 4, 1.0),
        ("sqrt", 0, 0.5),
        ("annealed", 0, 1.0),
        ("annealed", 1, 0.8),
        ("annealed", 4, 0.2),
    ],
)
def test_tasks_are_drawn_by_a_power_of_their_size(mixing: str, epoch: int, alpha: float) -> None:
    curriculum = build(mixing, sizes=LARGE, epochs=5)
    found = shares(curriculum, epoch)
    for task, expected in EXPECTED[alpha].items():
        deviation = (expected * (1 - expected) / 4000) ** 0.5
        assert abs(found[task] - expected) < 4 * deviation


def test_the_exponent_falls_from_1_to_a_fifth_over_the_epochs() -> None:
    curriculum = build("annealed", epochs=5)
    assert isinstance(curriculum, Annealed)
    assert [curriculum.alpha(epoch) for epoch in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    begun = build("annealed", epochs=2.5)
    assert isinstance(begun, Annealed)
    assert [begun.alpha(epoch) for epoch in range(3)] == pytest.approx([1.0, 0.6, 0.2])
    single = build("annealed", epochs=1)
    assert isinstance(single, Annealed)
    assert single.alpha(0) == 1.0


@pytest.mark.parametrize("mixing", ["proportional", "sqrt", "annealed"])
def test_an_epoch_of_drawn_tasks_is_as_long_as_one_of_whole_passes(mixing: str) -> None:
    assert build(mixing).steps_per_epoch == 9
    assert build(mixing, "smallest").steps_per_epoch == 6
    late = build(mixing, start={"para": 1})
    assert (late.epoch_steps(0), late.epoch_steps(1)) == (4, 9)


def test_draws_depend_on_seed_epoch_and_place_alone() -> None:
    draws = {
        (seed, epoch): [build("sqrt", seed=seed).tasks_of(epoch, place)[0] for place in range(60)]
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len({tuple(tasks) for tasks in draws.values()}) == 4
    curriculum = build("sqrt")
    assert [next(iter(curriculum.next())) for _ in range(18)] == draws[0, 0][:9] + draws[0, 1][:9]


def test_the_draws_never_change() -> None:
    """Resuming a run, and comparing it with an older one, depend on them."""
    drawn = "t t s s p p p p p p t p p p p p p p p s s s s p p s p"
    assert schedule(build("proportional"), 27) == drawn


# ---- dynamic ----


def rows(curriculum: Curriculum) -> list[int]:
    return [len(examples) for examples in curriculum.next().values()]


def test_dynamic_gives_rows_to_the_tasks_with_low_scores() -> None:
    """B = 15, K = 3. d = 4 * (0.5, 0.1, 0.25) sums to 3.4; 12 d / 3.4 = 7.06, 1.41, 3.53; rounded 7, 1, 4."""
    curriculum = build("dynamic", sizes=LARGE)
    assert rows(curriculum) == [5, 5, 5]
    curriculum.observe({"sst": 0.5, "para": 0.9, "sts": 0.75})
    assert rows(curriculum) == rows(curriculum) == [8, 2, 5]
    curriculum.observe({"sst": 0.6, "para": 0.6, "sts": 0.6})
    assert rows(curriculum) == [5, 5, 5]


def test_dynamic_starts_from_the_batch_sizes_and_keeps_every_task() -> None:
    """B = 24, K = 3. d = (15, 3, 3) * (0, 0.5, 0.25) = 0, 1.5, 0.75; 21 d / 2.25 = 0, 14, 7."""
    curriculum = build("dynamic", sizes=LARGE, batch_sizes=(16, 4, 4))
    assert rows(curriculum) == [16, 4, 4]
    curriculum.observe({"sst": 1.0, "para": 0.5, "sts": 0.75})
    assert rows(curriculum) == [1, 15, 8]
    curriculum.observe({"sst": 1.0, "para": 1.0, "sts": 1.0})
    assert rows(curriculum) == [16, 4, 4]
    curriculum.observe({"sst": 1.0, "para": 1.0, "sts": -0.3})
    assert rows(curriculum) == [1, 1, 22]


def test_dynamic_has_the_steps_of_parallel_and_shares_rows_among_those_that_have_started() -> None:
    curriculum = build("dynamic", 2, sizes=LARGE, start={"sst": 1})
    assert curriculum.steps_per_epoch == 2
    curriculum.observe({"sst": 0.0, "para": 0.8, "sts": 0.4})  # 8 * (0.8, 2.4) / 3.2 = 2, 6
    assert [rows(curriculum), rows(curriculum)] == [[3, 7], [3, 7]]
    assert isinstance(curriculum, Dynamic)
    assert list(curriculum.next()) == ["sst", "para", "sts"]


def test_dynamic_ends_a_cycle_with_what_is_left() -> None:
    curriculum = build("dynamic")
    curriculum.observe({"sst": 0.5, "para": 0.9, "sts": 0.75})
    assert [rows(curriculum)[0] for _ in range(4)] == [8, 2, 8, 2]

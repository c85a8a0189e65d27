"""The input of the next steps comes as it would without a thread, and the thread never outlives the training."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mtbert.curriculum import Curriculum, CurriculumConfig, Plan, build_curriculum
from mtbert.data.batching import TaskBatches
from mtbert.engine.input_pipeline import InputConfig, InputPipeline
from mtbert.errors import ConfigError, DataError

SIZES = {"sst": 10, "para": 25, "sts": 7}
MIXINGS = ["parallel", "round-robin", "sequential", "proportional", "sqrt", "annealed", "dynamic"]
Drawn = tuple[int, dict[str, list[int]]]


def build(mixing: str) -> Curriculum:
    batches = {name: TaskBatches(np.arange(1, size + 1), 5, 0, name) for name, size in SIZES.items()}
    return build_curriculum(batches, CurriculumConfig(mixing), sizes=SIZES, seed=0, epochs=4)  # type: ignore[arg-type]


def prepared(plan: Plan, step: int) -> Drawn:
    return step, {task: examples.tolist() for task, examples in plan.items()}


def evaluates(step: int) -> bool:
    return step % 3 == 0


def pipeline(curriculum: Curriculum, ahead: int, prepare: Any = prepared) -> InputPipeline[Any]:
    return InputPipeline(curriculum, prepare, ahead=ahead, evaluates=evaluates)


def train(inputs: InputPipeline[Drawn], first: int, last: int) -> Iterator[tuple[Drawn, dict[str, Any]]]:
    """What the steps from `first` to `last` read, and the state behind each; scores differ from one to the next."""
    with inputs:
        for step in range(first, last + 1):
            ready = inputs.next()
            if evaluates(step):
                inputs.observe({"sst": 0.07 * step, "para": 0.9 / step, "sts": 0.5})
            yield ready, inputs.state()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("ahead", [1, 2, 50])
@pytest.mark.parametrize("mixing", MIXINGS)
def test_a_thread_changes_neither_the_steps_nor_the_states(mixing: str, ahead: int) -> None:
    plain, threaded = build(mixing), build(mixing)
    expected = list(train(pipeline(plain, 0), 1, plain.total_steps))
    found = list(train(pipeline(threaded, ahead), 1, 7))
    assert found == expected[:7]
    assert threaded.state() == expected[6][1], "nothing that was drawn too many is left behind"

    resumed = build(mixing)
    resumed.restore(found[4][1])
    assert list(train(pipeline(resumed, ahead), 6, resumed.total_steps)) == expected[5:]


def test_no_more_than_the_given_number_of_steps_is_made_ahead() -> None:
    made, reached = [], threading.Event()

    def prepare(plan: Plan, step: int) -> int:
        made.append(step)
        if len(made) == 3:
            reached.set()
        return step

    with pipeline(build("parallel"), 2, prepare) as inputs:
        assert inputs.next() == 0
        assert reached.wait(10)
    assert made == [0, 1, 2]


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_comes_with_its_own_step(ahead: int) -> None:
    def prepare(plan: Plan, step: int) -> int:
        if step == 2:
            raise DataError("sst.csv, line 7: too long")
        return step

    curriculum = build("sequential")
    with pipeline(curriculum, ahead, prepare) as inputs:
        assert [inputs.next(), inputs.next()] == [0, 1]
        state = inputs.state()
        with pytest.raises(DataError, match="line 7: too long"):
            inputs.next()
    if ahead:
        assert curriculum.state() == state


def test_the_end_waits_for_nothing_but_the_step_at_hand() -> None:
    begun, release = threading.Event(), threading.Event()

    def prepare(plan: Plan, step: int) -> int:
        begun.set()
        release.wait(10)
        return step

    with contextlib.suppress(KeyboardInterrupt), pipeline(build("parallel"), 9, prepare):
        assert begun.wait(10)
        release.set()
        raise KeyboardInterrupt


def test_a_step_that_scores_would_change_is_not_given_away_before_them() -> None:
    with pipeline(build("dynamic"), 4) as inputs:
        for _ in range(3):
            inputs.next()
        with pytest.raises(RuntimeError, match="step 4"):
            inputs.next()


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"input.ahead: expected at least 0, or auto, found -1"):
        InputConfig(-1)

"""Which rows are made, and the draws behind it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtbert.augmentation.plan import Goal, plan_rows, strata
from mtbert.data.tables import Table
from mtbert.errors import ConfigError, DataError
from mtbert.tasks.registry import get_task


def table(labels: list[float], task: str = "sst") -> Table:
    kind = get_task(task).layout.labels.dtype
    texts = [(f"sentence {n}",) for n in range(len(labels))]
    return Table(
        task, "train", Path("t.csv"), [str(n) for n in range(len(labels))], texts, np.array(labels, kind), []
    )


def test_classes_become_even_and_each_row_serves_before_one_serves_twice() -> None:
    train = table([0] * 9 + [1] * 4 + [3] * 2)
    slots = plan_rows(get_task("sst"), train, Goal("equalise"), range(15), attempts=4, seed=1)
    assert Counter(slot.stratum for slot in slots) == {1: 5, 3: 7}
    for stratum, rows in ((1, range(9, 13)), (3, range(13, 15))):
        uses = Counter(slot.row(0) for slot in slots if slot.stratum == stratum)
        assert set(uses) == set(rows)
        assert max(uses.values()) - min(uses.values()) <= 1
    assert all(train.labels[slot.row(3)] == slot.stratum for slot in slots), "a stand-in is of the same class"
    assert slots == plan_rows(get_task("sst"), train, Goal("equalise"), range(15), attempts=4, seed=1)
    assert slots != plan_rows(get_task("sst"), train, Goal("equalise"), range(15), attempts=4, seed=2)
    few = plan_rows(get_task("sst"), train, Goal("equalise", limit=4), range(15), attempts=4, seed=1)
    assert Counter(slot.stratum for slot in few) == {1: 2, 3: 2}


def test_multiplying_makes_every_row_k_minus_one_times() -> None:
    train = table([0, 0, 1, 4])
    slots = plan_rows(get_task("sst"), train, Goal("multiply", 3), range(4), attempts=2, seed=0)
    assert Counter(slot.row(0) for slot in slots) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_scores_are_evened_out_by_tenths_of_their_range() -> None:
    labels = [0.0, 0.4, 0.5, 4.6, 5.0, 2.5]
    assert strata(get_task("sts"), np.array(labels)).tolist() == [0, 0, 1, 9, 9, 5]
    slots = plan_rows(get_task("sts"), table(labels, "sts"), Goal("equalise"), range(6), attempts=1, seed=0)
    assert Counter(slot.stratum for slot in slots) == {1: 1, 5: 1}


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ConfigError, match="even already"):
        plan_rows(get_task("sst"), table([0, 1]), Goal("equalise"), range(2), attempts=1, seed=0)
    with pytest.raises(DataError, match="class 1 can be rewritten"):
        plan_rows(get_task("sst"), table([0, 0, 1]), Goal("equalise"), range(2), attempts=1, seed=0)
    with pytest.raises(ConfigError, match="--multiply"):
        Goal("multiply", 1)

"""Intervals that cover what they promise, and paired differences that find what is there."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mtbert.errors import DataError
from mtbert.evaluation.bootstrap import Difference, Interval, align, intervals, paired_differences
from mtbert.evaluation.metrics import score
from mtbert.evaluation.predictions import Predictions
from mtbert.tasks.registry import TASKS, Task

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]


def binary_outputs(labels: np.ndarray, accuracy: float, generator: np.random.Generator) -> np.ndarray:
    right = generator.random(len(labels)) < accuracy
    return np.where(right == (labels == 1), 1.0, -1.0)[:, None]


def predictions(task: str, labels: np.ndarray, outputs: np.ndarray) -> Predictions:
    return Predictions(task, "dev", tuple(f"{task}-{i}" for i in range(len(labels))), labels, outputs)


def interval(task: Task, labels: np.ndarray, outputs: np.ndarray, **options: int) -> Interval:
    """The interval of a task alone."""
    return intervals(TASKS, {task.name: predictions(task.name, labels, outputs)}, **options)[task.name]


def paired_difference(
    task: Task, labels: np.ndarray, first: np.ndarray, second: np.ndarray, **options: int
) -> Difference:
    """The difference of two runs in a task alone."""
    ends = [{task.name: predictions(task.name, labels, outputs)} for outputs in (first, second)]
    return paired_differences(TASKS, *ends, **options)[task.name]


def test_accuracy_interval_is_that_of_the_binomial() -> None:
    labels = np.arange(400) % 2
    outputs = np.where(np.arange(400) < 300, 1, -1) * np.where(labels == 1, 1.0, -1.0)
    found = interval(PARA, labels, outputs[:, None], resamples=20_000)
    assert found.value == 0.75
    # Resampling 0/1 values is drawing from Binomial(n, p): the percentiles are known exactly.
    expected = stats.binom(400, 0.75).ppf([0.025, 0.975]) / 400
    assert [found.low, found.high] == pytest.approx(expected, abs=0.0026)


def test_pearson_interval_agrees_with_scipys_bootstrap() -> None:
    generator = np.random.default_rng(0)
    labels = generator.uniform(0, 5, 300)
    predicted = labels + generator.normal(size=300) * 1.5
    found = interval(STS, labels, predicted[:, None], resamples=4000)
    reference = stats.bootstrap(
        (labels, predicted),
        lambda x, y: stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(stats.pearsonr(labels, predicted).statistic)
    assert [found.low, found.high] == pytest.approx([reference.low, reference.high], abs=0.006)


@pytest.mark.parametrize("kind", ["accuracy", "pearson"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(kind: str) -> None:
    generator = np.random.default_rng(11)
    covered, trials = 0, 300
    for trial in range(trials):
        if kind == "accuracy":
            truth = 0.7
            labels = generator.integers(0, 2, 250)
            found = interval(
                PARA, labels, binary_outputs(labels, truth, generator), resamples=400, seed=trial
            )
        else:
            truth = 0.8
            pair = generator.multivariate_normal([0, 0], [[1, truth], [truth, 1]], size=250)
            found = interval(STS, pair[:, 0], pair[:, 1:], resamples=400, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / trials <= 0.985


def test_paired_difference_finds_a_real_one_and_not_a_null_one() -> None:
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 2, 3000)
    base = binary_outputs(labels, 0.80, generator)
    # Better on one wrong example in five: pairing sees it although the two intervals overlap.
    fixed = (generator.random(3000) < 0.2)[:, None] & ((base[:, :1] > 0) != (labels[:, None] == 1))
    better = np.where(fixed, -base, base)
    real = paired_difference(PARA, labels, base, better)
    assert real.low > 0
    assert real.share < 0.01
    assert real.value == pytest.approx(real.second - real.first)
    assert real.value == pytest.approx(fixed.mean())
    # Swapped, the same with the other sign.
    reverse = paired_difference(PARA, labels, better, base)
    assert reverse.high < 0
    assert [reverse.value, reverse.low, reverse.high] == pytest.approx([-real.value, -real.high, -real.low])


def test_null_differences_are_rarely_called_real() -> None:
    generator = np.random.default_rng(8)
    called = 0
    for trial in range(200):
        labels = generator.uniform(0, 5, 200)
        pair = [(labels + generator.normal(size=200))[:, None] for _ in range(2)]
        found = paired_difference(STS, labels, *pair, resamples=400, seed=trial)
        called += found.low > 0 or found.high < 0
    assert called / 200 < 0.10


def test_a_run_against_itself_differs_by_nothing() -> None:
    labels = np.arange(100) % 2
    outputs = binary_outputs(labels, 0.7, np.random.default_rng(0))
    found = paired_difference(PARA, labels, outputs, outputs)
    assert (found.value, found.low, found.high, found.share) == (0.0, 0.0, 0.0, 1.0)


def make_trio(seed: int, skill: float) -> dict[str, Predictions]:
    fixed, noise = np.random.default_rng(99), np.random.default_rng(seed)
    sst, para, sts = fixed.integers(0, 5, 400), fixed.integers(0, 2, 500), fixed.uniform(0, 5, 300)
    return {
        "sst": predictions("sst", sst, np.eye(5)[sst] * skill + noise.normal(size=(400, 5))),
        "para": predictions("para", para, (para[:, None] * 2 - 1) * skill + noise.normal(size=(500, 1))),
        "sts": predictions("sts", sts, sts[:, None] * skill + noise.normal(size=(300, 1))),
    }


def test_overall_resamples_the_tasks_independently() -> None:
    trio = make_trio(0, 1.0)
    found = intervals(TASKS, trio, resamples=4000)
    values = {
        name: score(TASKS[name], entry.labels, entry.outputs).headline
        for name, entry in trio.items()
        if entry.labels is not None
    }
    assert found["overall"].value == pytest.approx(
        (values["sst"] + values["para"] + (values["sts"] + 1) / 2) / 3
    )
    assert found["mean"].value == pytest.approx(sum(values.values()) / 3)
    # Independent: the variances add up, so the widths do so in squares.
    width = {name: entry.high - entry.low for name, entry in found.items()}
    assert width["mean"] == pytest.approx(
        (width["sst"] ** 2 + width["para"] ** 2 + width["sts"] ** 2) ** 0.5 / 3, rel=0.06
    )
    assert width["overall"] == pytest.approx(
        (width["sst"] ** 2 + width["para"] ** 2 + (width["sts"] / 2) ** 2) ** 0.5 / 3, rel=0.06
    )
    assert set(intervals(TASKS, {"sst": trio["sst"]})) == {"sst"}


def test_tasks_of_the_same_size_do_not_share_their_resamples() -> None:
    right = np.arange(400) % 2 == 0
    labels = np.zeros(400, dtype=np.int64)
    # The same examples are right in both: with shared resamples their scores would move together.
    entries = {
        "sst": predictions("sst", labels, np.eye(5)[np.where(right, 0, 1)]),
        "para": predictions("para", labels, np.where(right, -1.0, 1.0)[:, None]),
        "sts": predictions("sts", np.arange(400.0), np.arange(400.0)[:, None]),
    }
    found = intervals(TASKS, entries, resamples=4000)
    width = {name: entry.high - entry.low for name, entry in found.items()}
    assert width["mean"] == pytest.approx((width["sst"] ** 2 + width["para"] ** 2) ** 0.5 / 3, rel=0.1)


def test_results_depend_on_the_seed_alone() -> None:
    trio = make_trio(0, 1.0)
    assert intervals(TASKS, trio, seed=4) == intervals(TASKS, trio, seed=4)
    assert intervals(TASKS, trio, seed=4)["sts"] != intervals(TASKS, trio, seed=5)["sts"]
    # Another task beside it changes nothing.
    assert intervals(TASKS, {"sts": trio["sts"]}, seed=4)["sts"] == intervals(TASKS, trio, seed=4)["sts"]


def test_paired_overall_difference() -> None:
    first, second = make_trio(0, 1.0), make_trio(1, 1.5)
    found = paired_differences(TASKS, first, second)
    ends = intervals(TASKS, first), intervals(TASKS, second)
    for name in ("sst", "para", "sts", "overall", "mean"):
        assert found[name].value == pytest.approx(ends[1][name].value - ends[0][name].value)
        assert found[name].low < found[name].value < found[name].high
    assert found["overall"].low > 0
    same = paired_differences(TASKS, first, first)
    assert (same["overall"].low, same["overall"].high) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_pairs_are_matched_by_id() -> None:
    first, second = make_trio(0, 1.0)["para"], make_trio(1, 1.2)["para"]
    order = np.random.default_rng(2).permutation(len(second))
    assert second.labels is not None
    shuffled = Predictions(
        "para", "dev", tuple(second.ids[i] for i in order), second.labels[order], second.outputs[order]
    )
    assert paired_differences(TASKS, {"para": first}, {"para": shuffled}) == paired_differences(
        TASKS, {"para": first}, {"para": second}
    )


def test_different_examples_or_labels_are_refused() -> None:
    first = make_trio(0, 1.0)["para"]
    assert first.labels is not None
    part = Predictions("para", "dev", first.ids[:300], first.labels[:300], first.outputs[:300])
    with pytest.raises(DataError, match=r"para \(dev\): .*500 and 300, 300 of them shared"):
        align(first, part)
    renamed = replace(first, ids=tuple(f"other-{name}" for name in first.ids))
    with pytest.raises(DataError, match="500 and 500, 0 of them shared"):
        align(first, renamed)
    relabelled = replace(first, labels=1 - first.labels)
    with pytest.raises(DataError, match="500 of 500 examples have different labels"):
        align(first, relabelled)
    with pytest.raises(DataError, match="no labels"):
        intervals(TASKS, {"para": replace(first, labels=None)})


def test_degenerate_tables() -> None:
    none = interval(PARA, np.zeros(0, dtype=np.int64), np.zeros((0, 1)))
    assert (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    with pytest.warns(RuntimeWarning):
        constant = interval(STS, np.arange(10.0), np.ones((10, 1)))
    assert (constant.value, constant.low, constant.high) == (0.0, 0.0, 0.0)


def test_ten_thousand_rows_take_less_than_a_second() -> None:
    generator = np.random.default_rng(0)
    labels = generator.uniform(0, 5, 10_000)
    pair = [(labels + generator.normal(size=10_000))[:, None] for _ in range(2)]
    start = time.process_time()
    paired_difference(STS, labels, *pair, resamples=1000)
    assert time.process_time() - start < 1.0

"""Bootstrap intervals of headline scores, and paired differences of two runs (Efron and Tibshirani, 1993).

Every headline is a function of means over examples (hits for accuracy, first and second moments for Pearson's
correlation), so a resample is a vector of counts and all resamples are one matrix product. Tasks are
resampled independently of each other; two runs are resampled together, on the same examples.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtbert.errors import DataError
from mtbert.evaluation.metrics import COURSE_TRIO, mean_of, overall_of, score
from mtbert.evaluation.ordinal import mean_absolute_error, moments, quadratic_kappa
from mtbert.evaluation.predictions import Predictions, check_outputs, predictions_from_outputs

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

RESAMPLES = 1000
LEVEL = 0.95
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_CHUNK = 4_000_000  # examples drawn at once: bounds the memory at about 64 MB


@dataclass(frozen=True)
class Interval:
    """A score with the ends of its percentile interval (of probability LEVEL)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much the second of two runs is better than the first, with a percentile interval (LEVEL).

    `share` is like a two-sided p-value: twice the share of resamples in which the difference is not of the
    observed sign (at most 1).
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    share: float


def intervals(
    tasks: Mapping[str, Task],
    predictions: Mapping[str, Predictions],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of every task's headline, and of `overall` and `mean` when sst, para and sts are there."""
    values, samples = {}, {}
    for name, entry in predictions.items():
        labels = _labels(entry)
        samples[name] = _headline_samples(tasks[name], labels, [entry.outputs], resamples, seed)[0]
        values[name] = score(tasks[name], labels, entry.outputs).headline
    result = {name: _interval(values[name], samples[name]) for name in values}
    if all(name in values for name in COURSE_TRIO):
        for name, join in (("overall", overall_of), ("mean", mean_of)):
            value = join(*(values[part] for part in COURSE_TRIO))
            result[name] = _interval(value, join(*(samples[part] for part in COURSE_TRIO)))
    return result


def ordinal_intervals(
    task: Task, predictions: Predictions, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of what is scored beside the headline where classes have an order, by its name; else none."""
    if not task.ordered:
        return {}
    predicted = predictions_from_outputs(task, predictions.outputs)
    columns = moments(_labels(predictions), predicted)
    means = columns.mean(axis=0) if len(columns) else np.zeros(columns.shape[1])
    samples = _resampled_means(columns, resamples, _generator(task, seed))
    scored = {"mean absolute error": mean_absolute_error, "quadratic kappa": quadratic_kappa}
    return {name: _interval(float(of(means)), of(samples)) for name, of in scored.items()}


def paired_differences(
    tasks: Mapping[str, Task],
    first: Mapping[str, Predictions],
    second: Mapping[str, Predictions],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Differences (second minus first) of the tasks that both have, and of `overall` and `mean` when defined.

    Raises DataError when the two were not evaluated on the same examples.
    """
    ends: dict[str, tuple[float, float]] = {}
    samples: dict[str, np.ndarray] = {}
    for name in first:
        if name not in second:
            continue
        task, other = tasks[name], align(first[name], second[name])
        labels = _labels(first[name])
        pair = _headline_samples(task, labels, [first[name].outputs, other.outputs], resamples, seed)
        samples[name] = pair[1] - pair[0]
        ends[name] = (
            score(task, labels, first[name].outputs).headline,
            score(task, labels, other.outputs).headline,
        )
    result = {name: _difference(*ends[name], samples[name]) for name in ends}
    if all(name in ends for name in COURSE_TRIO):
        for name, join in (("overall", overall_of), ("mean", mean_of)):
            before, after = (join(*(ends[part][side] for part in COURSE_TRIO)) for side in (0, 1))
            # Both joins are affine, so their differences are joins of differences less the constant part.
            sampled = join(*(samples[part] for part in COURSE_TRIO)) - join(0.0, 0.0, 0.0)
            result[name] = _difference(before, after, sampled)
    return result


def align(first: Predictions, second: Predictions) -> Predictions:
    """`second` in the order of `first`'s ids; a DataError when ids or labels are not the same."""
    name = f"{first.task} ({first.split})"
    if second.ids != first.ids:
        places = {key: index for index, key in enumerate(second.ids)}
        shared = sum(key in places for key in first.ids)
        unique = len(set(first.ids)) == len(first) and len(places) == len(second)
        if not unique or shared != len(first) or len(second) != len(first):
            raise DataError(
                f"{name}: the runs were evaluated on different examples: {len(first)} and {len(second)}, "
                f"{shared} of them shared; compare runs that used the same data"
            )
        order = np.array([places[key] for key in first.ids])
        labels = None if second.labels is None else second.labels[order]
        second = Predictions(second.task, second.split, first.ids, labels, second.outputs[order])
    differing = int((_labels(first) != _labels(second)).sum())
    if differing:
        raise DataError(f"{name}: {differing} of {len(first)} examples have different labels in the two runs")
    return second


def _labels(predictions: Predictions) -> np.ndarray:
    if predictions.labels is None:
        raise DataError(f"{predictions.task} ({predictions.split}): the predictions have no labels")
    return predictions.labels


def _headline_samples(
    task: Task, labels: np.ndarray, runs: list[np.ndarray], resamples: int, seed: int
) -> list[np.ndarray]:
    """The headline of every run in every resample: one array [resamples] a run, on the same resamples."""
    generator = _generator(task, seed)
    labels = np.asarray(labels)
    if task.kind != "similarity":
        hits = [predictions_from_outputs(task, outputs) == labels for outputs in runs]
        means = _resampled_means(np.stack(hits, axis=1).astype(np.float64), resamples, generator)
        return list(means.T)
    truth = _standardised(labels.astype(np.float64))
    columns = [truth, truth * truth]
    for outputs in runs:
        predicted = _standardised(check_outputs(task, outputs)[:, 0])
        columns += [predicted, predicted * predicted, predicted * truth]
    means = _resampled_means(np.stack(columns, axis=1), resamples, generator)
    return [_pearson(means[:, :2], means[:, 2 + 3 * run : 5 + 3 * run]) for run in range(len(runs))]


def _generator(task: Task, seed: int) -> np.random.Generator:
    # The task's name is in the key: tasks are independent, and adding one leaves the others' figures alone.
    return np.random.default_rng([seed, zlib.crc32(task.name.encode())])


def _standardised(values: np.ndarray) -> np.ndarray:
    """`values` with mean 0 and standard deviation 1 (0 where constant): keeps the moments' rounding small."""
    if len(values) == 0:
        return values
    centred = values - values.mean()
    deviation = centred.std()
    return centred / deviation if deviation > 1e-13 * abs(values.mean()) else np.zeros_like(values)


def _pearson(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson's correlation [R] from moments [R, (y, yy)] and [R, (x, xx, xy)]; 0 where undefined."""
    covariance = predicted[:, 2] - predicted[:, 0] * truth[:, 0]
    variances = (truth[:, 1] - truth[:, 0] ** 2) * (predicted[:, 1] - predicted[:, 0] ** 2)
    defined = variances > 1e-12
    return np.where(defined, np.clip(covariance / np.sqrt(np.where(defined, variances, 1.0)), -1.0, 1.0), 0.0)


def _resampled_means(columns: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """The means [resamples, m] of columns [n, m] over n examples drawn with replacement."""
    rows = len(columns)
    if rows == 0:
        return np.zeros((resamples, columns.shape[1]))
    means = np.empty((resamples, columns.shape[1]))
    chunk = max(1, _CHUNK // rows)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(0, rows, size=(size, rows), dtype=np.int64)
        drawn += np.arange(size, dtype=np.int64)[:, None] * rows
        counts = np.bincount(drawn.reshape(-1), minlength=size * rows).reshape(size, rows)
        means[start : start + size] = counts.astype(np.float64) @ columns / rows
    return means


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = np.quantile(samples, _ENDS)
    return Interval(value, float(low), float(high))


def _difference(first: float, second: float, samples: np.ndarray) -> Difference:
    low, high = np.quantile(samples, _ENDS)
    # The observed sample counts as one resample, so that the share is never exactly 0.
    tail = 1 + min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    share = min(1.0, 2 * tail / (len(samples) + 1))
    return Difference(first, second, second - first, float(low), float(high), share)

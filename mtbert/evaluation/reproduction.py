"""Our runs beside the papers' figures: reading them, and whether a difference is more than noise."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats

from mtbert.evaluation.bootstrap import RESAMPLES, Interval, intervals
from mtbert.evaluation.published import PaperRow, Published
from mtbert.evaluation.reproduction_schedule import Schedule
from mtbert.evaluation.run import read_run
from mtbert.tasks.registry import TASKS

_QUORA = "para"
_ENOUGH = 0.99  # of the rows that the paper's schedule sees
_NORMAL = 1.96


@dataclass(frozen=True)
class SeedResult:
    """One finished run: dev scores with bootstrap intervals by task, `overall` and `mean`; what it was trained on."""

    folder: Path
    scores: Mapping[str, Interval]
    encoder: str
    schedule: Schedule
    train_rows: Mapping[str, int]
    steps: int
    seconds: float
    tokens: int
    synthetic: bool
    features_cached: bool


@dataclass(frozen=True)
class Summary:
    """A score over the seeds: mean, deviation (n - 1; None for one seed) and the mean of the bootstrap intervals' ends.

    An interval speaks of the choice of dev examples, which the seeds share: their mean is a slightly wide interval of
    the mean.
    """

    mean: float
    deviation: float | None
    low: float
    high: float


@dataclass(frozen=True)
class RowResult:
    """A row and its finished runs, at least one."""

    row: PaperRow
    seeds: tuple[SeedResult, ...]

    def summary(self, key: str) -> Summary | None:
        """A task, `overall` or `mean` over the seeds; None where the runs don't have it."""
        found = [seed.scores[key] for seed in self.seeds if key in seed.scores]
        if not found:
            return None
        values = [entry.value for entry in found]
        return Summary(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            statistics.fmean(entry.low for entry in found),
            statistics.fmean(entry.high for entry in found),
        )

    @property
    def schedule(self) -> Schedule:
        """How long the runs trained."""
        return self.seeds[0].schedule

    @property
    def score(self) -> Summary | None:
        """The score under the row's formula."""
        return self.summary(self.row.formula)

    @property
    def minutes(self) -> float:
        """Training time of a run, the mean over the seeds."""
        return statistics.fmean(seed.seconds for seed in self.seeds) / 60

    @property
    def tokens_per_second(self) -> float | None:
        """Useful tokens a second; None where cached features were read, which are no tokens."""
        if self.seeds[0].features_cached:
            return None
        return sum(seed.tokens for seed in self.seeds) / max(sum(s.seconds for s in self.seeds), 1e-9)


@dataclass(frozen=True)
class Verdict:
    """Ours minus the published figure, and what is to be made of it."""

    difference: float
    half_width: float
    """Of the 95% interval of the difference between two runs that differ by chance alone."""
    seeds: int
    reasons: tuple[str, ...]
    """Why the two can't be compared; empty where they can."""
    changed: str | None
    """How the run was made shorter (or longer) than the paper's: its difference then says nothing of the row."""

    @property
    def within_noise(self) -> bool:
        """Whether chance alone may explain the difference."""
        return abs(self.difference) <= self.half_width

    @property
    def conclusive(self) -> bool:
        """Whether the difference says something of the row."""
        return not self.reasons and self.changed is None

    @property
    def text(self) -> str:
        """In words."""
        if self.reasons:
            changed = [] if self.changed is None else [self.changed]
            return "not comparable: " + "; ".join([*self.reasons, *changed])
        found = "within noise" if self.within_noise else "higher" if self.difference > 0 else "lower"
        if self.seeds == 1 and not self.within_noise:
            found += " (one seed: the noise of training is not counted)"
        if self.changed is not None:
            return f"{self.changed}, so no verdict on the row; this run alone: {found}"
        return found


def judge(result: RowResult, published: Published) -> Verdict | None:
    """Compare under the row's formula; None where nothing was published or the run lacks the score.

    The half width joins three kinds of chance in quadrature: 1.96 standard errors of our dev set (from the bootstrap
    interval) and of the paper's, and for n > 1 seeds Student's t(.975, n - 1) times our deviation over them times
    sqrt(1 + 1 / n), because a published figure is one run and ours the mean of n. With one seed the last is unknown.
    """
    row, ours = result.row, result.score
    theirs = row.compared
    if theirs is None or ours is None:
        return None
    columns = {name: found.mean for name in published.dev if (found := result.summary(name))}
    examples = math.hypot((ours.high - ours.low) / 2, _NORMAL * row.standard_error(published.dev, columns))
    seeds, training = len(result.seeds), 0.0
    if ours.deviation is not None:
        training = float(stats.t.ppf(0.975, seeds - 1)) * ours.deviation * math.sqrt(1 + 1 / seeds)
    changed = result.schedule.changed(row.schedule)
    half_width = math.hypot(examples, training)
    return Verdict(ours.mean - theirs, half_width, seeds, _reasons(result, published), changed)


def _reasons(result: RowResult, published: Published) -> tuple[str, ...]:
    reasons = []
    if result.seeds[0].synthetic:
        reasons.append("synthetic data")
    ours, theirs = result.schedule, result.row.schedule
    if _QUORA in theirs.batch_sizes:
        seen = ours.distinct(_QUORA, result.seeds[0].train_rows)
        wanted = theirs.distinct(_QUORA, published.train)
        if seen < _ENOUGH * wanted:
            reasons.append(f"trained on {seen:,} different Quora pairs, the paper's schedule has {wanted:,}")
    reasons += [f"{task} joined too early" for task in ours.lost_starts(theirs)]
    return tuple(reasons)


def read_row(row: PaperRow, folders: Sequence[Path], resamples: int = RESAMPLES) -> RowResult | None:
    """The row's result from the folders of its finished runs; None without any."""
    seeds = tuple(_read_seed(folder, _age(folder), resamples) for folder in folders)
    return RowResult(row, seeds) if seeds else None


def _age(folder: Path) -> int:
    return (folder / "run.json").stat().st_mtime_ns


@functools.cache
def _read_seed(folder: Path, age: int, resamples: int) -> SeedResult:
    """A finished run; kept, because the table is written anew after every run. `age` tells a replaced run apart."""
    run = read_run(folder)
    tasks = {name: TASKS[name] for name in run.tasks}
    last = run.history.epochs[-1] if run.history.epochs else {}
    return SeedResult(
        folder=folder,
        scores=intervals(tasks, run.all_predictions(tasks), resamples=resamples),
        encoder=str(run.info.get("encoder")),
        schedule=Schedule.of(run.config()),
        train_rows={name: int(run.data(name, "train").get("rows") or 0) for name in tasks},
        steps=int(last.get("step") or 0),
        seconds=float(last.get("seconds") or 0.0),
        tokens=int(last.get("tokens") or 0),
        synthetic=bool(run.info.get("synthetic")),
        features_cached=run.features_cached,
    )

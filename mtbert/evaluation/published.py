"""What the five papers published, row by row, as presets/papers/rows.yaml holds it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from mtbert.errors import ConfigError
from mtbert.evaluation.metrics import COURSE_TRIO, mean_of, overall_of
from mtbert.evaluation.reproduction_schedule import Schedule

FOLDER = Path(str(resources.files("mtbert") / "presets" / "papers"))
ROWS_FILE = "rows.yaml"
FORMULAS = {"mean": mean_of, "overall": overall_of}

_ROUNDING = 0.0011  # a score and the mean of its columns, each rounded to three decimals


@dataclass(frozen=True)
class PaperRow:
    """One row of a paper, or a single-task run beside one (`single_of`)."""

    name: str
    paper: str
    title: str
    formula: str
    """mean, overall, or the task whose own figure is the score."""
    where: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Published dev figures by task: accuracy, or Pearson's correlation."""
    score: float | None = None
    """The published score of all tasks."""
    note: str = ""
    same_as: str | None = None
    """The row whose settings are the same; one run serves both."""
    single_of: str | None = None
    impossible: str | None = None
    """Why it cannot be run; it has no preset then."""
    hours: float | None = None
    """Published training time."""
    by_epoch: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """The row whose run this one reads."""
        return self.same_as or self.name

    @property
    def preset(self) -> Path:
        """The file of its settings."""
        return FOLDER / f"{self.name}.yaml"

    @property
    def settings(self) -> dict[str, Any]:
        """What the preset sets."""
        values: dict[str, Any] = yaml.safe_load(self.preset.read_text(encoding="utf-8"))
        return values

    @property
    def schedule(self) -> Schedule:
        """How long the paper trained, by the settings."""
        return Schedule.of(self.settings)

    @property
    def recomputed(self) -> float | None:
        """The row's formula of its published columns; None where one of them is missing."""
        if self.formula not in FORMULAS:
            return self.figures.get(self.formula)
        if not all(name in self.figures for name in COURSE_TRIO):
            return None
        return float(FORMULAS[self.formula](*(self.figures[name] for name in COURSE_TRIO)))

    @property
    def matches_neither(self) -> bool:
        """Whether the published score is neither formula of the published columns."""
        if self.score is None or not all(name in self.figures for name in COURSE_TRIO):
            return False
        columns = [self.figures[name] for name in COURSE_TRIO]
        return all(abs(join(*columns) - self.score) > _ROUNDING for join in FORMULAS.values())

    @property
    def compared(self) -> float | None:
        """The published number that a run is compared with: the score, or the formula of the columns where the score is
        missing or fits neither formula."""
        if self.score is None or self.matches_neither:
            return self.recomputed
        return self.score

    def standard_error(self, sizes: Mapping[str, int], figures: Mapping[str, float]) -> float:
        """One standard error of `compared`, from its dev set alone.

        sizes: dev examples by task. figures: what to take for columns that were not published. An accuracy p has
        sqrt(p (1 - p) / n), a correlation r has (1 - r^2) / sqrt(n - 1); the tasks are independent.
        """
        known = {**figures, **self.figures}

        def error(task: str) -> float:
            value = known[task]
            if task == "sts":
                return (1 - value**2) / math.sqrt(sizes[task] - 1)
            return math.sqrt(value * (1 - value) / sizes[task])

        if self.formula not in FORMULAS:
            return error(self.formula)
        sts = error("sts") / (2 if self.formula == "overall" else 1)
        return math.hypot(error("sst"), error("para"), sts) / 3


@dataclass(frozen=True)
class Published:
    """All rows by name, the papers' titles, and the sizes of the course's tables by task."""

    rows: Mapping[str, PaperRow]
    titles: Mapping[str, str]
    train: Mapping[str, int]
    dev: Mapping[str, int]

    def select(self, papers: Collection[str] = (), names: Collection[str] = ()) -> list[PaperRow]:
        """The rows of those papers, or of those names; without either all.

        ConfigError for unknown ones, and for names that are not of those papers.
        """
        _check("--paper", papers, self.titles)
        _check("--rows", names, self.rows)
        for name in names:
            if papers and self.rows[name].paper not in papers:
                raise ConfigError(
                    f"--rows: {name} is a row of {self.rows[name].paper}, and --paper selects {', '.join(papers)}"
                    f" alone; possible: rows of {', '.join(papers)}, or no --paper"
                )
        return [
            row
            for row in self.rows.values()
            if (not papers or row.paper in papers) and (not names or row.name in names)
        ]


def _check(option: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            listed = ", ".join(known) if len(known) < 10 else "--list shows them"
            raise ConfigError(f"{option}: unknown {name!r}.{hint} Possible: {listed}")


def read_published(path: Path = FOLDER / ROWS_FILE) -> Published:
    """The rows of the papers, in their order."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = {}
    for paper, entry in content["papers"].items():
        for name, values in entry["rows"].items():
            figures = dict(values.pop("figures", {}))
            score = figures.pop("score", None)
            rows[name] = PaperRow(
                **({"name": name, "paper": paper, "formula": entry["formula"]} | values),
                figures=figures,
                score=score,
            )
    titles = {paper: entry["title"] for paper, entry in content["papers"].items()}
    return Published(rows, titles, content["course"]["train"], content["course"]["dev"])

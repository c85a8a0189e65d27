"""The registry of tasks. A new task is one `register(Task(...))` in a module named by `--plugins`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtbert.data.tables import ClassLabels, ScoreLabels, TableLayout
from mtbert.errors import ConfigError

Kind = Literal["classification", "binary", "similarity"]


@dataclass(frozen=True)
class Task:
    """One sentence task: its tables and the kind of its labels.

    `kind` decides the head's outputs, the loss and the headline metric:
    `classification` has one logit a class, cross-entropy and accuracy; `binary` one logit, binary
    cross-entropy and accuracy; `similarity` one score in label units, the squared error of the score
    scaled to 0..1, and Pearson's correlation.
    """

    name: str
    title: str
    kind: Kind
    layout: TableLayout
    files: Mapping[str, str] = field(default_factory=dict)
    """File name of each split (`train`, `dev`, `test`) in a data folder."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in label order; empty for similarity tasks."""
    ordered: bool = False
    """Whether the classes are steps of a scale, so that a neighbour is less wrong: then mean absolute error and
    quadratic weighted kappa are reported, too. The training doesn't know of it."""

    def __post_init__(self) -> None:
        labels = self.layout.labels
        if self.kind == "similarity" and not isinstance(labels, ScoreLabels):
            raise ConfigError(f"task {self.name}: a similarity task needs ScoreLabels, found {labels}")
        if self.kind != "similarity" and not isinstance(labels, ClassLabels):
            raise ConfigError(f"task {self.name}: a {self.kind} task needs ClassLabels, found {labels}")
        if self.ordered and (self.kind != "classification" or self.classes < 3):
            raise ConfigError(f"task {self.name}: ordered needs a classification of 3 or more classes")
        if isinstance(labels, ClassLabels):
            if self.kind == "binary" and labels.count != 2:
                raise ConfigError(f"task {self.name}: a binary task has 2 classes, found {labels.count}")
            if self.class_names and len(self.class_names) != labels.count:
                raise ConfigError(
                    f"task {self.name}: {len(self.class_names)} class names for {labels.count} classes"
                )

    @property
    def is_pair(self) -> bool:
        """Whether an example holds two sentences."""
        return len(self.layout.text_columns) == 2

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for an example."""
        labels = self.layout.labels
        return labels.count if self.kind == "classification" and isinstance(labels, ClassLabels) else 1

    @property
    def classes(self) -> int:
        """The number of classes; 0 for a similarity task."""
        labels = self.layout.labels
        return labels.count if isinstance(labels, ClassLabels) else 0

    @property
    def score_range(self) -> tuple[float, float] | None:
        """The lowest and the highest label of a similarity task, else None."""
        labels = self.layout.labels
        return (labels.low, labels.high) if isinstance(labels, ScoreLabels) else None


TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Add `task` to the registry; its name becomes valid in `--tasks` and as a configuration group."""
    if task.name in TASKS:
        raise ConfigError(f"a task named {task.name!r} is registered already")
    if not task.name.isidentifier():
        raise ConfigError(f"a task's name must be an identifier (it names options), found {task.name!r}")
    TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of that name, or a ConfigError that lists the known ones."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"tasks: unknown task {name!r}.{hint} Known tasks: {', '.join(TASKS)}")
    return TASKS[name]


register(
    Task(
        name="sst",
        title="SST-5 sentiment",
        kind="classification",
        layout=TableLayout(("sentence",), "sentiment", ClassLabels(5)),
        files={"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv", "test": "ids-sst-test-student.csv"},
        class_names=("very negative", "negative", "neutral", "positive", "very positive"),
        ordered=True,
    )
)
register(
    Task(
        name="para",
        title="Quora paraphrase",
        kind="binary",
        layout=TableLayout(("sentence1", "sentence2"), "is_duplicate", ClassLabels(2)),
        files={"train": "quora-train.csv", "dev": "quora-dev.csv", "test": "quora-test-student.csv"},
        class_names=("different", "paraphrase"),
    )
)
register(
    Task(
        name="sts",
        title="STS-B similarity",
        kind="similarity",
        layout=TableLayout(("sentence1", "sentence2"), "similarity", ScoreLabels(0.0, 5.0)),
        files={"train": "sts-train.csv", "dev": "sts-dev.csv", "test": "sts-test-student.csv"},
    )
)
register(
    Task(
        name="cfimdb",
        title="CFIMDB sentiment",
        kind="classification",
        layout=TableLayout(("sentence",), "sentiment", ClassLabels(2)),
        files={
            "train": "ids-cfimdb-train.csv",
            "dev": "ids-cfimdb-dev.csv",
            "test": "ids-cfimdb-test-student.csv",
        },
        class_names=("negative", "positive"),
    )
)

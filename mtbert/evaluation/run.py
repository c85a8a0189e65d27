"""Reading a run's folder: its facts, history, configuration and predictions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.baselines import Baselines, baselines_from_histograms
from mtbert.evaluation.history import History, read_history
from mtbert.evaluation.predictions import Predictions, predictions_path, read_outputs
from mtbert.evaluation.profile import ProfileFacts, read_profile
from mtbert.outside_files import (
    MOST_YAML_BYTES,
    own_file,
    parse_yaml_object,
    read_json_object,
    read_text,
    read_yaml_object,
)

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task


_MOST_CLASSES = 100_000
_SEED_FOLDER = re.compile(r"seed-\d+")  # as training with several seeds names them


@dataclass(frozen=True)
class Run:
    """What a run's folder holds: run.json as `info`, metrics.jsonl as `history`, config.yaml as text."""

    folder: Path
    info: dict[str, Any]
    history: History
    config_text: str
    profile: ProfileFacts | None = None
    """Where the time of some steps went, for a run that torch's profiler has recorded."""

    @property
    def name(self) -> str:
        """The run's name, by default its folder's; one of several seeds carries its experiment's, too."""
        folder = self.folder.resolve()
        name = str(self.info.get("name") or folder.name)
        if name == folder.name and _SEED_FOLDER.fullmatch(name) and folder.parent.name:
            return f"{folder.parent.name}/{name}"
        return name

    @property
    def git(self) -> str:
        """The commit that the run was made with, `-dirty` when files differed from it."""
        return str(self.info.get("git") or "unknown commit")

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that the run trained."""
        return [str(name) for name in self.info.get("tasks", [])]

    @property
    def halved(self) -> bool:
        """Whether one half of dev chose the checkpoint, so that the result is of the other half."""
        evaluation = self.config().get("evaluation")
        return isinstance(evaluation, dict) and evaluation.get("selection") == "half"

    @property
    def features_cached(self) -> bool:
        """Whether the encoder was frozen and read every table once, so that training read its features."""
        return self.info.get("mode") == "last-linear-layer"

    @property
    def frozen_layers(self) -> str | None:
        """What was frozen below the lowest trained layer, whether it dropped, and how often it was computed."""
        facts = self.info.get("frozen_layers")
        return frozen_layers_text(facts) if isinstance(facts, dict) and not self.features_cached else None

    @property
    def checkpointing(self) -> str | None:
        """What gradient checkpointing computed again; None where it was off."""
        found = self.config().get("checkpointing")
        if not isinstance(found, dict) or found.get("mode") in (None, "none"):
            return None
        every = found.get("every", 1)
        return f"{found['mode']}" + (f", every {every} layers" if every != 1 else "")

    def config(self) -> dict[str, Any]:
        """config.yaml as nested dictionaries."""
        return parse_yaml_object(self.config_text, self.folder / "config.yaml", DataError)

    def data(self, task: str, split: str) -> dict[str, Any]:
        """What run.json says of one table; empty where it says nothing."""
        return dict((self.info.get("data") or {}).get(task, {}).get(split) or {})

    def has_predictions(self, task: str, split: str = "dev") -> bool:
        """Whether the folder has predictions of a task on a split."""
        return predictions_path(self.folder, task, split).is_file()

    def predictions(self, task: Task, split: str = "dev") -> Predictions:
        """The predictions of one task; a DataError where they are missing or damaged."""
        path = predictions_path(self.folder, task.name, split)
        return read_outputs(own_file(self.folder, str(path.relative_to(self.folder)), DataError), task, split)

    def all_predictions(self, tasks: Mapping[str, Task], split: str = "dev") -> dict[str, Predictions]:
        """The predictions of every task that has them."""
        names = [name for name in self.tasks if self.has_predictions(name, split)]
        return {name: self.predictions(tasks[name], split) for name in names}


def read_run(folder: Path) -> Run:
    """Read a run's folder; a ConfigError when it is none, a DataError when a file of it is damaged."""
    facts, config, metrics = (
        own_file(folder, name, DataError) for name in ("run.json", "config.yaml", "metrics.jsonl")
    )
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    if not facts.is_file():
        raise ConfigError(_not_a_run(folder))
    info = read_json_object(facts, DataError)
    _check_info(facts, info)
    return Run(
        folder=folder,
        info=info,
        history=read_history(metrics) if metrics.exists() else History(),
        config_text=read_text(config, DataError, MOST_YAML_BYTES) if config.is_file() else "",
        profile=read_profile(folder),
    )


def _check_info(path: Path, info: Mapping[str, Any]) -> None:
    """Raise DataError for a run.json whose facts are not of the kinds that a report reads."""

    def expect(holds: bool, place: str, expected: str, found: Any) -> None:
        if not holds:
            raise DataError(f"{path}: {place}: expected {expected}, found {str(found)[:80]}")

    names = info.get("tasks", [])
    expect(
        isinstance(names, list) and all(isinstance(n, str) for n in names), "tasks", "a list of names", names
    )
    for name in ("versions", "parameters"):
        expect(isinstance(info.get(name), dict | None), name, "an object", info.get(name))
    data = info.get("data") or {}
    expect(isinstance(data, dict), "data", "an object", data)
    for task, splits in data.items():
        expect(isinstance(splits, dict), f"data.{task}", "an object", splits)
        for split, facts in splits.items():
            place = f"data.{task}.{split}"[:80]
            expect(isinstance(facts, dict), place, "an object", facts)
            for name in (
                "rows",
                "problem_count",
                "duplicate_ids",
                "truncated",
                "max_length",
                "tokens",
                "overlap",
            ):
                expect(_is_count(facts.get(name, 0)), f"{place}.{name}", "a count", facts.get(name))
            expect(
                isinstance(facts.get("problems", []), list),
                f"{place}.problems",
                "a list",
                facts.get("problems"),
            )
            for name in ("labels", "own_labels"):
                labels = facts.get(name)
                expect(labels is None or _is_histogram(labels), f"{place}.{name}", "counts, or null", labels)
            extras = facts.get("extra") or []
            expect(isinstance(extras, list), f"{place}.extra", "a list", extras)
            for extra in extras:
                holds = isinstance(extra, dict) and (
                    all(isinstance(extra.get(name), str) for name in ("file", "sha256"))
                    and all(_is_count(extra.get(name)) for name in ("rows", "left_out"))
                )
                expect(holds, f"{place}.extra", "file, sha256, rows, left_out", extra)
            expect(not extras or "rows" in facts, f"{place}.rows", "a count", None)


def _is_histogram(labels: Any) -> bool:
    """Counts, or an object with them."""
    counts = labels.get("counts") if isinstance(labels, dict) else labels
    return isinstance(counts, list) and 0 < len(counts) <= _MOST_CLASSES and all(map(_is_count, counts))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _not_a_run(folder: Path) -> str:
    """Why a folder without run.json is no run; the parent of several seeds' runs names one of them."""
    try:
        seeds = read_yaml_object(folder / "config.yaml", DataError).get("seeds")
    except DataError:
        seeds = None
    if isinstance(seeds, int) and seeds > 1:
        begun = sorted(file.parent for file in folder.glob("seed-*/run.json"))
        example = f"give one of them, such as {begun[0]}" if begun else "none of them has begun"
        return f"{folder}: holds the runs of {seeds} seeds, each in a folder of its own: {example}"
    return f"{folder}: is not a run's folder: run.json is missing"


def frozen_layers_text(facts: Mapping[str, Any]) -> str | None:
    """What run.json says of `frozen_layers`, in words; None where there are none."""
    if not facts.get("layers"):
        return None
    text = f"the embeddings and the first {facts['layers']}"
    if facts.get("cached"):
        return f"{text}, without dropout; their outputs are computed once and read from files"
    return f"{text}, {'with' if facts.get('drop') else 'without'} dropout"


def check_tasks(run: Run, tasks: Mapping[str, Task]) -> None:
    """Raise ConfigError when the run trained a task that is not registered here."""
    unknown = [name for name in run.tasks if name not in tasks]
    if unknown:
        raise ConfigError(
            f"{run.folder}: trained the task(s) {', '.join(unknown)}, which nothing here registers "
            f"(known: {', '.join(tasks)})"
        )


def run_baselines(run: Run, tasks: Mapping[str, Task]) -> dict[str, Baselines]:
    """The baselines of every task, from the label histograms in run.json."""
    return {
        name: baselines_from_histograms(
            task,
            # Of the training table's own rows: extra ones that even out the classes leave no commonest class.
            run.data(name, "train").get("own_labels") or run.data(name, "train").get("labels"),
            run.data(name, "dev").get("labels"),
        )
        for name, task in tasks.items()
    }

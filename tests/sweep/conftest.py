"""Sweeps of tiny trainings on the built-in sample, in this process or in forked ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtbert import sweep, train
from mtbert.evaluation import sweep_report
from mtbert.sweeps.space_file import read_space
from mtbert.sweeps.study import Study, TrialFacts

pytest.importorskip("optuna")


class Sweeps:
    """Writes a search space, runs it, and looks at what came of it."""

    def __init__(self, folder: Path, bert: Path) -> None:
        self.folder = folder
        self.bert = bert

    def space(self, parameters: dict[str, Any], *, steps: int = 4, name: str = "space", **more: Any) -> Path:
        """A search space over trainings of so many steps of six examples a task."""
        sizes = {
            f"{task}.{field}": value for task in ("sst", "para", "sts") for field, value in _SIZES.items()
        }
        fixed = sizes | {
            "data": "sample",
            "model.pretrained": str(self.bert),
            "cache": str(self.folder / "cache"),
            "precision": "float32",
            "epochs": 1,
            "curriculum.epoch_length": steps,
            "evaluation.train_examples": 0,
            "run.tensorboard": False,
        }
        set_here = {field for value in parameters.values() for field in _fields(value)} | set(parameters)
        fixed = {name: value for name, value in fixed.items() if name not in set_here} | more.pop("fixed", {})
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"fixed": fixed, "parameters": parameters, **more}, sort_keys=False))
        return path

    def run(self, space: Path, name: str, *options: object) -> Path:
        """The sweep's folder, after a run in this process."""
        output = self.folder / name
        sweep.main([str(space), "--output", str(output), *map(str, options)])
        return output

    def fork(self, space: Path, name: str, *options: object) -> int:
        """The same in a process of its own; returns its id."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with open(os.devnull, "w") as null:
                    os.dup2(null.fileno(), 1)
                self.run(space, name, *options)
                code = 0
            finally:
                os._exit(code)
        return pid

    def trials(self, output: Path, space: Path, storage: str | None = None) -> list[TrialFacts]:
        """What the study holds."""
        return Study(output, read_space(space), storage=storage).trials()


_PLOTS = sweep_report._plots
_SIZES = {"batch_size": 6, "max_length": 64}


def _fields(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return []
    named = value.get("choices")
    inner = [field for each in named.values() for field in each] if isinstance(named, dict) else []
    return [*value.get("fields", []), value.get("field", ""), *inner]


@pytest.fixture
def sweeps(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """Sweeps whose trials leave out the plots of their reports, which take longer than the trainings."""

    def report(folder: Path, *_: object, **__: object) -> Path:
        (folder / "report.md").write_text("a report", encoding="utf-8")
        return folder / "report.md"

    monkeypatch.setattr(train, "write_report", report)
    monkeypatch.setattr(sweep_report, "_plots", lambda sweep: {})
    return Sweeps(tmp_path, tiny_bert)


@pytest.fixture
def drawn_plots(sweeps: Sweeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep's own report has its plots."""
    monkeypatch.setattr(sweep_report, "_plots", _PLOTS)


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)

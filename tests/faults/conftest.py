"""A small real training to be killed: a tiny BERT, tables on the disk, and what a run must come to without a fault."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bert import WORDS, write_tiny_bert
from support.trainings import Training, TrainingServer, training_server

from mtbert.engine.checkpoint import Checkpoint, CheckpointStore

STEPS = 18
TRAIN_ROWS = 36
_TIMES = ("seconds", "input_wait_seconds", "tokens_per_second")


def write_tables(folder: Path) -> None:
    """SST, paraphrase and similarity tables in the CS224N layout, of random words."""
    folder.mkdir()
    chance = random.Random(0)
    words = WORDS.split()

    def sentence() -> str:
        return " ".join(chance.choices(words, k=chance.randint(2, 12)))

    def write(
        name: str, columns: str, letter: str, rows: int, texts: int, label: Callable[[], object]
    ) -> None:
        lines = [f"\tid\t{columns}"]
        for row in range(rows):
            fields = [str(row), f"{letter}{row:02d}", *(sentence() for _ in range(texts)), str(label())]
            lines.append("\t".join(fields))
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    pair = "sentence1\tsentence2"
    for split, rows in (("train", TRAIN_ROWS), ("dev", 12)):
        write(f"ids-sst-{split}.csv", "sentence\tsentiment", "a", rows, 1, lambda: chance.randrange(5))
        write(f"quora-{split}.csv", f"{pair}\tis_duplicate", "b", rows, 2, lambda: float(chance.randrange(2)))
        write(f"sts-{split}.csv", f"{pair}\tsimilarity", "c", rows, 2, lambda: chance.randrange(51) / 10)


@dataclass(frozen=True)
class Workplace:
    """Where trainings run, and how one is started."""

    server: TrainingServer
    tables: Path
    bert: Path

    def arguments(self, run: Path, *more: object) -> list[object]:
        """18 steps in 3 epochs with an evaluation each; a checkpoint also every 4 steps; dropout is on."""
        options: dict[str, object] = {
            "data": self.tables,
            "output": run,
            "model.pretrained": self.bert,
            "cache": self.server.folder / "cache",
            "epochs": 3,
            "threads": 1,
            "precision": "float32",
            "max_tokens": 512,
            "run.log_every": 3,
            "run.checkpoint_every": 4,
            "run.tensorboard": "false",
            "evaluation.train_examples": 12,
            "evaluation.resamples": 10,
        }
        for task in ("sst", "para", "sts"):
            options |= {f"{task}.batch_size": 6, f"{task}.max_length": 64}
        return [f"--{name}={value}" for name, value in options.items()] + list(more)

    def start(self, run: Path, *more: object) -> Training:
        """Start a new run."""
        return self.server.start(self.arguments(run, *more))

    def resume(self, run: Path) -> Training:
        """Start the resumption of a run."""
        return self.server.start(["--resume", run])

    def train_to_step(self, training: Training, run: Path, step: int) -> bool:
        """Wait until metrics.jsonl has come to `step`; False when the training ended before."""
        return training.until(lambda: steps_logged(run) >= step)

    def train_to_the_last_checkpoint(self, training: Training, run: Path, steps: int = STEPS) -> None:
        """Wait for the checkpoint of the last step; the report that would follow is spared by a kill."""
        assert training.until(lambda: (run / "checkpoints" / f"step-{steps}").exists()), training.err
        training.kill()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    if not hasattr(os, "fork"):
        pytest.skip("trainings are started by fork and ended by SIGKILL")
    folder = tmp_path_factory.mktemp("trainings")
    write_tables(folder / "tables")
    write_tiny_bert(folder / "bert")
    with training_server(folder) as server:
        yield Workplace(server, folder / "tables", folder / "bert")


@pytest.fixture(scope="session")
def uninterrupted(workplace: Workplace) -> Path:
    """The folder of a run without any fault, up to its last checkpoint."""
    run = workplace.server.folder / "uninterrupted"
    workplace.train_to_the_last_checkpoint(workplace.start(run), run)
    return run


def no_problem(text: str) -> None:
    raise AssertionError(f"unexpected problem: {text}")


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint; all of them must be whole."""
    return CheckpointStore(run / "checkpoints").load_newest(no_problem)


def steps_logged(run: Path) -> int:
    """The last step in metrics.jsonl, as a reader sees it while the training writes."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def metrics_without_times(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in _TIMES} for line in lines]


def assert_same_run(run: Path, expected: Path) -> None:
    """Weights, moments, progress and metrics are equal bit for bit; only times may differ."""
    found, wanted = newest(run), newest(expected)
    assert found is not None
    assert wanted is not None
    assert found.step == wanted.step
    for mine, theirs in ((found.model, wanted.model), (found.optimizer, wanted.optimizer)):
        assert mine.keys() == theirs.keys()
        different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        assert not different
    progress, wanted_progress = found.state["progress"], wanted.state["progress"]
    assert {**progress, "seconds": 0} == {**wanted_progress, "seconds": 0}
    assert found.state["curriculum"] == wanted.state["curriculum"]
    assert metrics_without_times(run) == metrics_without_times(expected)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Where a test's own run goes."""
    return tmp_path / "run"


def copy_run(source: Path, target: Path) -> Path:
    """A run's folder under another name."""
    return Path(shutil.copytree(source, target))

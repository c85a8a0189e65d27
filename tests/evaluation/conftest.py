"""Run folders as training leaves them, made of seeded random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtbert.evaluation.baselines import label_histogram
from mtbert.evaluation.metrics import aggregates, score
from mtbert.evaluation.predictions import Predictions, write_prediction_files
from mtbert.tasks.registry import TASKS, Task

SIZES = {"sst": 1101, "para": 2000, "sts": 863, "cfimdb": 245}
TRAIN_SIZES = {"sst": 8544, "para": 22757, "sts": 6040, "cfimdb": 1707}
SHARES = {
    "sst": [0.13, 0.26, 0.19, 0.27, 0.15],
    "para": [0.63, 0.37],
    "cfimdb": [0.49, 0.51],
}


def make_labels(task: Task, count: int, generator: np.random.Generator) -> np.ndarray:
    if task.kind == "similarity":
        return np.round(generator.beta(1.3, 1.1, count) * 5, 1)
    return generator.choice(task.classes, count, p=SHARES[task.name]).astype(np.int64)


def make_outputs(task: Task, labels: np.ndarray, skill: float, generator: np.random.Generator) -> np.ndarray:
    """Outputs [n, k] that grow better with `skill`."""
    noise = generator.normal(size=(len(labels), task.outputs))
    if task.kind == "similarity":
        return (labels[:, None] * skill + noise * 1.2 + 2.5 * (1 - skill)).astype(np.float32)
    if task.kind == "binary":
        return ((labels[:, None] * 2 - 1) * 2 * skill + noise).astype(np.float32)
    centres = -np.abs(np.arange(task.classes)[None, :] - labels[:, None])
    return (centres * 1.4 * skill + noise).astype(np.float32)


def make_predictions(task: Task, skill: float, seed: int = 0, count: int | None = None) -> Predictions:
    """Dev predictions: the examples depend on the task alone, the outputs on `skill` and `seed`."""
    size = SIZES[task.name] if count is None else count
    fixed = np.random.default_rng(len(task.name) * 1000 + task.outputs)
    labels = make_labels(task, size, fixed)
    ids = tuple(f"{task.name}{number:06x}" for number in range(size))
    outputs = make_outputs(task, labels, skill, np.random.default_rng(seed))
    return Predictions(task.name, "dev", ids, labels, outputs.astype(np.float64))


def make_history(
    tasks: Sequence[Task], skill: float, seed: int, epochs: int = 4, steps: int = 200
) -> list[dict]:
    """Lines of metrics.jsonl; times and tokens of epoch and evaluation lines count from the start."""
    generator = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    total, seconds = epochs * steps, 0.0
    for step in range(10, total + 1, 10):
        seconds += 1.5 + 0.1 * generator.random()
        left = np.exp(-3 * step / total)
        losses = {task.name: float(0.2 + left + 0.08 * generator.normal()) for task in tasks}
        lines.append(
            {
                "kind": "step",
                "step": step,
                "epoch": step / steps,
                "loss": losses,
                "total_loss": sum(losses.values()),
                "lr": 5e-5 * min(step / 80, (total - step) / (total - 80)),
                "grad_norm": float(2 + 3 * left + generator.gamma(2, 0.4)),
                "tokens": 5000,
                "seconds": 1.5,
            }
        )
        if step % steps:
            continue
        epoch = step // steps
        reached = skill * (0.5 + 0.5 * epoch / epochs)
        scores = {}
        for split, gain in (("train", 1.25), ("dev", 1.0)):
            scores[split] = {}
            for task in tasks:
                entry = make_predictions(task, reached * gain, seed + epoch)
                scores[split][task.name] = score(task, entry.labels, entry.outputs)
        lines.append(
            {
                "kind": "evaluation",
                "step": step,
                "epoch": float(epoch),
                "seconds": seconds,
                "tokens": 500 * step,
                "train": {name: value.to_json() for name, value in scores["train"].items()},
                "dev": {name: value.to_json() for name, value in scores["dev"].items()},
                "dev_loss": {task.name: float(0.35 + left + 0.05 * epoch) for task in tasks},
                **aggregates(scores["dev"]),
            }
        )
        lines.append(
            {
                "kind": "epoch",
                "step": step,
                "epoch": float(epoch),
                "seconds": seconds,
                "tokens": 500 * step,
                "tokens_per_second": 500 * step / seconds,
            }
        )
    return lines


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run's folder under `tmp_path` and returns it."""

    def make(
        name: str = "run-a",
        *,
        names: Sequence[str] = ("sst", "para", "sts"),
        skill: float = 0.9,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        info: dict[str, Any] | None = None,
        predictions: dict[str, Predictions] | None = None,
        history: bool = True,
        predicted: bool = True,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tasks = [TASKS[task] for task in names]
        entries = {task.name: make_predictions(task, skill, seed) for task in tasks} | (predictions or {})
        generator = np.random.default_rng(7)
        data = {}
        for task in tasks:
            labels = {
                "train": make_labels(task, TRAIN_SIZES[task.name], generator),
                "dev": entries[task.name].labels,
            }
            data[task.name] = {
                split: {
                    "file": task.files[split],
                    "rows": len(labels[split]),
                    "problems": [],
                    "truncated": 3,
                    "labels": label_histogram(task, labels[split]),
                }
                for split in ("train", "dev")
            }
            data[task.name]["dev"]["overlap"] = 2
        facts = {
            "name": name,
            "git": "0123456789ab-dirty",
            "created": "2026-11-20 10:00:00 +0000",
            "versions": {"python": "3.11", "torch": "2.13.0"},
            "device": "cpu",
            "threads": 2,
            "parameters": {"trainable": 22_713_216, "total": 22_713_216},
            "data": data,
            "tasks": list(names),
            "encoder": "minilm",
            "synthetic": False,
            "contamination": None,
        }
        (folder / "run.json").write_text(json.dumps(facts | (info or {})), encoding="utf-8")
        settings = {"seed": seed, "output": str(folder), "optim": {"lr": 5e-5, "weight_decay": 0.01}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})), encoding="utf-8")
        if history:
            lines = make_history(tasks, skill, seed)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if predicted:
            for task in tasks:
                write_prediction_files(folder, task, entries[task.name])
        return folder

    return make

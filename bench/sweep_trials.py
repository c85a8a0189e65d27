"""Trials an hour: of a sweep, whose trials share what they can, against the same trainings in processes of their own.

    OMP_NUM_THREADS=1 python -m bench.sweep_trials --data DIR --mode last-linear-layer --trials 6

Both sides train, evaluate twice, predict dev and write their reports; the tables have no test split. Prints one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from mtbert.engine.environment import environment
from mtbert.sweep import main as sweep
from mtbert.tasks.registry import get_task

_TIMES = {"seconds", "input_wait_seconds", "tokens_per_second"}


def labelled_tables(source: Path, folder: Path) -> Path:
    """The train and dev tables of the three tasks alone."""
    folder.mkdir()
    for task in ("sst", "para", "sts"):
        for split in ("train", "dev"):
            name = get_task(task).files[split]
            (folder / name).symlink_to((source / name).resolve())
    return folder


def settings(data: Path, cache: Path, mode: str, epochs: float, every: int) -> dict[str, Any]:
    """What every trial has; they differ by their seed alone, so that all are the same work."""
    return {
        "data": str(data),
        "cache": str(cache),
        "mode": mode,
        "epochs": epochs,
        "optim.lr": 1e-3,
        "evaluation.every": every,
        "evaluation.train_examples": 0,
        "run.tensorboard": False,
    }


def run_apart(values: dict[str, Any], seed: int, output: Path) -> float:
    """Seconds of one training in a process of its own."""
    options = [f"--{name}={json.dumps(value).strip(chr(34))}" for name, value in values.items()]
    begun = time.perf_counter()
    subprocess.run(
        [
            *[sys.executable, "-m", "mtbert.train", "--preset", "minilm", *options],
            *[f"--seed={seed}", f"--output={output}"],
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begun


def run_together(values: dict[str, Any], seeds: int, folder: Path) -> tuple[list[float], float]:
    """Seconds of each trial of a sweep in the order in which they ran, and of the whole sweep with its report."""
    space = {
        "preset": "minilm",
        "fixed": values,
        "method": "grid",
        "parameters": {"seed": list(range(seeds))},
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space), encoding="utf-8")
    begun = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        sweep([str(path), "--output", str(folder / "sweep"), "--keep", "all"])
    whole = time.perf_counter() - begun
    with (folder / "sweep" / "trials.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["trial"]))
    return [float(row["seconds"]) for row in rows], whole


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in _TIMES} for line in lines]


def main() -> None:
    """Measure both sides, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--mode", default="last-linear-layer", choices=["last-linear-layer", "lora", "full"])
    parser.add_argument("--epochs", type=float, default=0.06)
    parser.add_argument("--every", type=int, default=17, help="steps from one evaluation to the next")
    parser.add_argument("--trials", type=int, default=6, help="of the sweep")
    parser.add_argument("--apart", type=int, default=2, help="how many of them run in processes of their own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = labelled_tables(options.data, folder / "data")
        values = settings(data, folder / "cache", options.mode, options.epochs, options.every)
        together, whole = run_together(values, options.trials, folder)  # also fills the cache of tokens
        apart = [run_apart(values, seed, folder / f"apart-{seed}") for seed in range(options.apart)]
        trials = sorted((folder / "sweep" / "trials").iterdir())
        equal = all(
            records(trials[seed]) == records(folder / f"apart-{seed}") for seed in range(options.apart)
        )
    result = {
        "mode": options.mode,
        "same records to the last digit": equal,
        "threads": torch.get_num_threads(),
        "seconds of each trial of the sweep": [round(seconds, 1) for seconds in together],
        "seconds of the sweep": round(whole, 1),
        "seconds of each process of its own": [round(seconds, 1) for seconds in apart],
        "trials an hour in the sweep, from the second on": round(3600 / statistics.median(together[1:])),
        "trials an hour in processes of their own": round(3600 / statistics.median(apart)),
        "environment": environment(torch.device("cpu")),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

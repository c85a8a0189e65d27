"""Time to a first result: from the start of a process to the first score on dev after a short training."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.measure import Side
from bench.workload import MAX_LENGTH, MIX, REAL, REAL_DATA, Workload
from mtbert.data.tables import Table, write_table
from mtbert.engine.precision import Precision
from mtbert.errors import UserError
from mtbert.tasks.loading import SAMPLE, load_tables

STEPS = 4
DEV = 256
"""Examples of each task that are scored, at most."""
SECONDS = "seconds_to_first_result"
_LONGEST = 600
_LOOK = 0.01
"""Seconds between two looks for a result."""
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Small:
    """Small tables in the CS224N layout, for both sides."""

    folder: Path
    sizes: dict[str, int]
    """Training examples of each task."""
    tokens: int
    """Useful tokens of all of them."""


def write_small_tables(workload: Workload, folder: Path) -> Small:
    """So many training examples as make STEPS steps of the workload, and DEV of dev."""
    source = str(REAL_DATA) if workload.source == REAL else SAMPLE
    folder.mkdir(parents=True)
    sizes, tokens = {}, 0
    for name, tables in load_tables(source, list(workload.tasks.values())).items():
        files = workload.tasks[name].files
        chosen = np.concatenate([step[name] for step in workload.steps[:STEPS]])
        data = workload.data[name]
        write_table(folder / files["train"], _some(data.table, chosen), workload.tasks[name].layout)
        dev = tables["dev"]
        some = np.arange(min(DEV, len(dev)))
        write_table(folder / files["dev"], _some(dev, some), workload.tasks[name].layout)
        sizes[name] = len(chosen)
        tokens += int(data.lengths[chosen].sum())
    return Small(folder, sizes, tokens)


def own_side(name: str, workload: Workload, small: Small, device: str, precision: Precision) -> Side:
    """`python -m mtbert.train`, with an empty cache and a new folder each time, until metrics.jsonl has a score."""
    command = [sys.executable, "-m", "mtbert.train", "--data", str(small.folder)]
    command += ["--model.pretrained", str(workload.encoder), "--device", device, "--precision", precision]
    command += ["--epochs", "1", "--curriculum.epoch_length", str(STEPS), "--evaluation.train_examples", "0"]
    command += ["--max_tokens", str(max(4096, 2 * workload.tokens_per_step))]
    for task, size in small.sizes.items():
        command += [f"--{task}.batch_size", str(-(-size // STEPS)), f"--{task}.max_length", str(MAX_LENGTH)]
    number = 0

    def run(repeat: int) -> float:
        nonlocal number
        number += 1
        folder = small.folder.with_name(f"run-{number}")
        new = ["--output", str(folder), "--cache", str(folder.with_name(f"cache-{number}"))]
        _until([*command, *new], lambda: has_score(folder / "metrics.jsonl"))
        return small.tokens

    return _timed(Side(name, run))


def peer_side(
    name: str, workload: Workload, small: Small, device: str, precision: Precision, *, compiled: bool = False
) -> Side:
    """A script over `transformers` that trains and scores on the same (bench/first_result_peer.py)."""
    command = [sys.executable, "-m", "bench.first_result_peer", "--data", str(small.folder)]
    command += ["--encoder", str(workload.encoder), "--steps", str(STEPS), "--device", device]
    command += ["--bf16"] * (precision == "bf16") + ["--compiled"] * compiled

    def run(repeat: int) -> float:
        found = _until(command, None)
        assert set(json.loads(found.splitlines()[-1])["dev"]) == set(MIX)
        return small.tokens

    return _timed(Side(name, run))


def has_score(metrics: Path) -> bool:
    """Whether a run has written an evaluation."""
    if not metrics.is_file():
        return False
    lines = metrics.read_bytes().split(b"\n")[:-1]
    return any(json.loads(line)["kind"] == "evaluation" for line in lines)


def _timed(side: Side) -> Side:
    """The side, with the median of its measured seconds (not of its first run) among its figures."""
    taken: list[float] = []

    def run(repeat: int) -> float:
        begin = time.perf_counter()
        work = side.run(repeat)
        taken.append(time.perf_counter() - begin)
        side.figures[SECONDS] = statistics.median(taken[1:] or taken)
        return work

    return dataclasses.replace(side, run=run)


def _until(command: Sequence[str], there: Callable[[], bool] | None) -> str:
    """Run a command until a result is there (None: until it ends); returns its output. Raises UserError."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, cwd=_ROOT
    )
    try:
        begin = time.monotonic()
        while there is not None and process.poll() is None and not there():
            if time.monotonic() - begin > _LONGEST:
                raise UserError(f"{' '.join(command)} had no result after {_LONGEST} s")
            time.sleep(_LOOK)
        if there is not None and there():
            return ""
        output, errors = process.communicate(timeout=_LONGEST)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
    if process.returncode or there is not None:
        raise UserError(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-2000:]}")
    return output


def _some(table: Table, chosen: np.ndarray) -> Table:
    places = chosen.tolist()
    assert table.labels is not None
    return dataclasses.replace(
        table,
        ids=[table.ids[i] for i in places],
        texts=[table.texts[i] for i in places],
        labels=table.labels[chosen],
        lines=[table.lines[i] for i in places],
    )

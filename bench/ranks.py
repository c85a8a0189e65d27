"""Useful tokens a second of `torchrun ... -m mtbert.train` against the number of its processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.comparison import Comparison, Goal, summarise
from bench.harness import Bench
from bench.measure import Alternation, Side
from bench.workload import MAX_LENGTH, MIX, REAL, REAL_DATA
from mtbert.errors import UserError
from mtbert.tasks.loading import SAMPLE

NAME = "scaling: ranks"
_SECONDS = 600
"""Longest run."""
_STEPS = 20


def compare_ranks(bench: Bench, counts: Sequence[int], *, rounds: int) -> Comparison:
    """Short runs with so many processes in turn, each in fresh ones; a run's rate is its training's own, from
    metrics.jsonl: evaluations, start and end don't count."""
    sides = [
        Side(_label(ranks), lambda _, ranks=ranks: train(bench, ranks), {"at": ranks}) for ranks in counts
    ]
    # A run's work is its rate, and every look at this clock comes a second after the last.
    alternation = Alternation(sides, clock=itertools.count().__next__)
    for _ in range(rounds):
        alternation.round()
    goals = [Goal(_label(ranks), _label(counts[0])) for ranks in counts[1:]]
    return summarise(NAME, alternation, baseline=_label(counts[0]), goals=goals)


def train(bench: Bench, ranks: int) -> float:
    """Useful tokens a second of a training in `ranks` processes. Raises UserError with what it said when it fails."""
    tokens = bench.workload.wanted_tokens
    lengths = {name: float(bench.workload.data[name].lengths.mean()) for name in MIX}
    scale = tokens / sum(MIX[name] * lengths[name] for name in MIX)
    with tempfile.TemporaryDirectory(prefix="mtbert-bench-") as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "mtbert.train", "--output", str(run), "--cache", str(Path(folder) / "cache")]
        command += ["--data", str(REAL_DATA) if bench.workload.source == REAL else SAMPLE]
        command += ["--model.pretrained", str(bench.workload.encoder), "--device", bench.device.type]
        command += ["--max_tokens", str(max(4096, 2 * tokens)), "--evaluation.train_examples", "0"]
        for name, share in MIX.items():
            examples = max(1, round(scale * share))
            command += [f"--{name}.batch_size", str(examples), f"--{name}.max_length", str(MAX_LENGTH)]
        command += ["--curriculum.epoch_length", str(_STEPS), "--epochs", "1", "--run.tensorboard", "false"]
        threads = max(1, (os.cpu_count() or 1) // ranks)
        found = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if found.returncode:
            raise UserError(f"{' '.join(command)} ended with {found.returncode}:\n{found.stderr[-2000:]}")
        lines = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    return float([line for line in lines if line["kind"] == "epoch"][-1]["tokens_per_second"])


def _label(ranks: int) -> str:
    return f"mtbert @ {ranks} rank{'s' if ranks > 1 else ''}"

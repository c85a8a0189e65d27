"""Seconds on the wall from nothing to a score: python -m bench.speedrun --data DIR

Every run is `python -m mtbert.train` with a preset in a fresh process, on all three tasks, for a number of steps that
is fixed beforehand. The clock starts before the process does, so that imports, reading, building graphs and every
evaluation count; the tokenised tables come from a cache only with --warm. Several seeds, the medians, a plot of the
score on dev against the seconds. On a CPU the default is a short run of one seed that says so: the goal is for a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import records
from bench.harness import load
from bench.measure import Spread
from bench.page import write_page
from bench.peers import peer_versions
from bench.workload import REAL, REAL_DATA
from mtbert.cli import parse_train, preset_path, run_main
from mtbert.config import TrainConfig
from mtbert.data.tokenisation import Tokeniser
from mtbert.engine.build import TaskSplits, curriculum_of, prepare_data, task_batches, tasks_of
from mtbert.engine.environment import environment
from mtbert.engine.precision import resolve_device
from mtbert.errors import ConfigError, UserError
from mtbert.evaluation.plots.style import GREY, MARKERS, SEQUENCE, Source, legend, panels, save, tidy
from mtbert.model.pretrained import resolve
from mtbert.tasks.loading import load_tables

TARGET, LIMIT = 0.750, 20.0
"""Overall on dev, and the seconds that it should take at most on one H200."""
SEEDS = {"cuda": 5, "cpu": 1}
CPU_STEPS = 60
"""Of a run on a CPU, where --steps does not say otherwise."""
EVALUATIONS = {"cuda": 8, "cpu": 2}
_LOOK = 0.02
"""Seconds between two looks for a new score."""


@dataclass(frozen=True)
class Point:
    """A score on dev."""

    seconds: float
    """Since before the process was started."""
    step: int
    score: float
    """Overall: (SST + paraphrase + (STS + 1) / 2) / 3."""


@dataclass(frozen=True)
class Run:
    """One seed's training."""

    seed: int
    steps: int
    points: list[Point]
    seconds: float
    """Until the score of the last step was there."""

    @property
    def score(self) -> float:
        """At the last step."""
        return self.points[-1].score

    def seconds_to(self, target: float) -> float | None:
        """Until the first score of at least `target`; None where there is none."""
        return next((point.seconds for point in self.points if point.score >= target), None)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.speedrun", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", default=str(REAL_DATA), help="folder of the CS224N tables, or sample")
    parser.add_argument("--preset", default="minilm", help="a preset of mtbert, or a YAML file")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--steps", type=int, help=f"optimizer steps (default: the preset's; {CPU_STEPS} on a CPU)"
    )
    parser.add_argument("--seeds", type=int, help="runs (default: 5; 1 on a CPU)")
    parser.add_argument(
        "--evaluations", type=int, help="scores of a run, the last included (default: 8; 2 on a CPU)"
    )
    parser.add_argument("--warm", action="store_true", help="tokenised tables come from a cache")
    parser.add_argument("--target", type=float, default=TARGET, help="overall on dev")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder of the record")
    parser.add_argument("options", nargs="*", help="after --: options of mtbert.train")
    given = parser.parse_args(arguments)
    device = resolve_device(given.device)
    for name in ("steps", "seeds", "evaluations"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, found {value}")
    preset_path(given.preset)
    base = ["--preset", given.preset, "--data", given.data, "--device", given.device, *given.options]
    whole, per_epoch = planned_steps(base)
    steps = given.steps or (min(CPU_STEPS, whole) if device.type == "cpu" else whole)
    evaluations = min(steps, given.evaluations or EVALUATIONS[device.type])
    base += ["--epochs", repr(steps / per_epoch), "--evaluation.every", str(-(-steps // evaluations))]
    base += ["--evaluation.train_examples", "0", "--run.tensorboard", "false"]
    note = ""
    if device.type == "cpu" or steps != whole:
        note = (
            f"{steps} of the preset's {whole} steps on {device.type}: this shows the course of a run, not the goal,"
            " which is for the whole preset on a GPU."
        )
        print(note)
    before = load()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="mtbert-speedrun-") as folder:
        if given.warm:
            fill_cache(base, Path(folder) / "cache")
        for seed in range(given.seeds or SEEDS[device.type]):
            cache = Path(folder) / ("cache" if given.warm else f"cache-{seed}")
            runs.append(time_run(base, seed, steps, Path(folder) / f"run-{seed}", cache))
            print(describe(runs[-1], given.target), flush=True)
    facts = environment(device)
    facts["versions"] |= peer_versions()
    facts |= {
        "encoder": f"preset {given.preset}" + (f" {' '.join(given.options)}" if given.options else ""),
        # Where a folder lies on this machine is nobody's business.
        "source": REAL if Path(given.data).resolve() == REAL_DATA.resolve() else Path(given.data).name,
        "tokens_per_step": None,
        "load": [before, load()],
    }
    name = facts.pop("device")
    found = summary(runs, given.target, comparable=not note) | {
        "note": note,
        "measured": facts,
        "warm": given.warm,
    }
    given.results.mkdir(parents=True, exist_ok=True)
    image = plot(
        runs, given.target, Source(name, facts["git"]), given.results / f"{records.slug(name)}-speedrun.png"
    )
    found["plot"] = image.name
    path = records.write_speedrun(given.results, name, f"speedrun {given.preset}", found)
    print(verdict(found))
    print(f"{path}\n{image}\n{write_page(given.results)}")


def planned_steps(options: Sequence[str]) -> tuple[int, int]:
    """Optimizer steps of a training with these options, and of one of its epochs. Raises UserError."""
    config = parse_train(list(options))
    data = _tokenised(config)
    whole = curriculum_of(config, task_batches(config, data)).total_steps
    return whole, curriculum_of(dataclasses.replace(config, epochs=1), task_batches(config, data)).total_steps


def fill_cache(options: Sequence[str], cache: Path) -> None:
    """Tokenise the tables of a training into its cache."""
    _tokenised(parse_train([*options, "--cache", str(cache)]))


def _tokenised(config: TrainConfig) -> TaskSplits:
    tokeniser = Tokeniser.from_folder(resolve(config.model.pretrained))
    return prepare_data(config, load_tables(config.data, list(tasks_of(config).values())), tokeniser)


def time_run(options: Sequence[str], seed: int, steps: int, folder: Path, cache: Path) -> Run:
    """Train one seed in a fresh process, and note when each score is there. Raises UserError when it fails."""
    command = [sys.executable, "-m", "mtbert.train", *options, "--seed", str(seed)]
    command += ["--output", str(folder), "--cache", str(cache)]
    log = folder.with_suffix(".txt")
    points: list[Point] = []
    with log.open("w", encoding="utf-8") as file:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            while True:
                ended = process.poll() is not None
                now = time.perf_counter() - begin
                for line in scores(folder / "metrics.jsonl")[len(points) :]:
                    points.append(Point(now, line["step"], line["overall"]))
                if ended or (points and points[-1].step == steps):
                    break
                time.sleep(_LOOK)
        finally:
            # What comes after the last score (predictions, the report) is waited for, so that it disturbs no other run.
            code = process.wait()
    if code or not points or points[-1].step != steps:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise UserError(
            f"{' '.join(command)} ended with {code} and without a score after step {steps}:\n{said}"
        )
    return Run(seed, steps, points, points[-1].seconds)


def scores(metrics: Path) -> list[dict[str, Any]]:
    """The evaluations that a run has written so far."""
    if not metrics.is_file():
        return []
    lines = [json.loads(line) for line in metrics.read_bytes().split(b"\n")[:-1]]
    return [line for line in lines if line["kind"] == "evaluation"]


def summary(runs: Sequence[Run], target: float, *, comparable: bool) -> dict[str, Any]:
    """The record: medians over the seeds, each run, and whether the goal is met (None where it is for other settings).

    The goal is met where the median seed ends at `target` or above and the median of the seconds in all is below LIMIT.
    """
    seconds, final = [run.seconds for run in runs], [run.score for run in runs]
    met = statistics.median(final) >= target and statistics.median(seconds) < LIMIT
    return {
        "target": target,
        "limit": LIMIT,
        "met": met if comparable else None,
        "seconds": dataclasses.asdict(Spread.of(seconds)),
        "score": dataclasses.asdict(Spread.of(final)),
        "runs": [
            {
                "seed": run.seed,
                "steps": run.steps,
                "seconds": run.seconds,
                "seconds_to_target": run.seconds_to(target),
                "score": run.score,
                "points": [dataclasses.asdict(point) for point in run.points],
            }
            for run in runs
        ],
    }


def plot(runs: Sequence[Run], target: float, source: Source, path: Path) -> Path:
    """Score against seconds, a curve a seed."""
    figure, (panel,) = panels(1, source, width=7.0, height=4.0)
    for number, run in enumerate(runs):
        panel.plot(
            [point.seconds for point in run.points],
            [point.score for point in run.points],
            color=SEQUENCE[number % len(SEQUENCE)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=f"seed {run.seed}",
        )
    panel.axhline(target, color=GREY, linestyle="--", linewidth=1.2, label=f"target {target:g}")
    title = f"Score against time, {runs[0].steps} steps"
    tidy(panel, title, "seconds since before the process started", "overall on dev")
    panel.set_xlim(left=0)
    legend(panel)
    return save(figure, path)


def describe(run: Run, target: float) -> str:
    """One run in a line."""
    reached = run.seconds_to(target)
    when = f"{target:g} after {reached:.1f} s" if reached is not None else f"never {target:g}"
    return f"seed {run.seed}: overall {run.score:.4f} after {run.steps} steps and {run.seconds:.1f} s; {when}"


def verdict(found: dict[str, Any]) -> str:
    """The medians, and the goal where it applies."""
    said = f"median: overall {found['score']['median']:.4f} in {found['seconds']['median']:.1f} s"
    if found["met"] is None:
        return said
    wanted = f"overall {found['target']:g} in under {found['limit']:g} s"
    return f"goal {'met' if found['met'] else 'MISSED'}: {said}, wanted {wanted}"


if __name__ == "__main__":
    run_main(main)

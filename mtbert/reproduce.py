"""`python -m mtbert.reproduce --data DIR`: run the papers' rows and write one table of published figures and ours."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from mtbert import train
from mtbert.cli import count, run_main
from mtbert.config import to_dict
from mtbert.engine.folder_lock import FolderLock
from mtbert.engine.interruptions import stop_with_parent
from mtbert.engine.reproduction import Job, Runner
from mtbert.errors import ConfigError, UserError
from mtbert.evaluation.comparison import config_differences
from mtbert.evaluation.published import PaperRow, Published, read_published
from mtbert.evaluation.reproduction import read_row
from mtbert.evaluation.reproduction_page import Reproduction, write_reproduction
from mtbert.evaluation.run import read_run
from mtbert.reproduction_plan import Plan, listing, make_plans, total_seconds

_TRAIN = "import sys; from mtbert.reproduce import train_row; train_row(int(sys.argv.pop(1)))"
# Where a run computes may differ between two attempts, and the rest says what was not asked for.
_FREE_KEYS = ("cache", "compile", "device", "kernels", "output", "plugins", "precision", "threads")


def main(arguments: list[str]) -> None:
    """Run, or list, the rows that the command line asks for."""
    options = _parser().parse_args(arguments)
    published = read_published()
    rows = published.select(options.paper, options.rows)
    if options.table:
        with _locked(options.output):
            print(f"table: {_write(published, rows, options.output)}")
        return
    if not options.list and all(row.impossible for row in rows):
        reasons = "; ".join(f"{row.name}: {row.impossible}" for row in rows)
        raise ConfigError(f"--rows: nothing selected can be run ({reasons}); possible: --list shows the rows")
    if options.data is None:
        if not options.list:
            raise ConfigError("--data: expected a folder in the CS224N layout, hub or sample; found nothing")
        print(listing(rows, {}, None))
        return
    plans = make_plans(
        rows,
        data=options.data,
        model=options.model,
        scale=options.scale,
        max_steps=options.max_steps,
        max_tokens=options.max_tokens,
        lr_factor=options.lr_factor,
    )
    if options.list:
        _list(rows, plans, options)
        return
    with _locked(options.output):
        _reproduce(published, rows, plans, options)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other processes from writing into `output`."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(output)
        holder = lock.acquire()
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
    if holder is not None:
        raise UserError(f"{output} is in use by {holder}: wait, or give another --output")
    try:
        yield
    finally:
        lock.release()


def train_row(parent: int) -> None:
    """Train as the command line says; stop with a checkpoint when the process `parent` is gone."""
    stop_with_parent(parent)
    run_main(train.main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.reproduce",
        description="Run the rows of the five papers one after another and write published figures and ours into one"
        " table. The same command again skips what is done and goes on with what was interrupted.",
        epilog="--debug shows the traceback of an error.",
    )
    add = parser.add_argument
    add(
        "--paper", type=_names, default=[], metavar="A,B", help="of chan, crichton, delacruz, luo, peng (all)"
    )
    add("--rows", type=_names, default=[], metavar="A,B", help="rows, which are named as presets (all)")
    add(
        "--model",
        default="minilm",
        help="minilm, a folder, or a hub id such as bert-base-uncased (%(default)s)",
    )
    add("--scale", type=_positive, default=1.0, metavar="X", help="share of the papers' epochs (%(default)s)")
    add(
        "--lr-factor",
        type=_positive,
        default=1.0,
        metavar="X",
        help="multiplies the learning rates of rows that train the encoder, for shortened trainings (%(default)s)",
    )
    add("--max-steps", type=count, metavar="N", help="steps of a run at most, where the scale leaves more")
    add(
        "--max-tokens",
        type=_positive,
        metavar="X",
        help="training tokens of a run at most, each example counted once: rows that differ in the method alone get the"
        " same steps, and rows of small batches more than under --max-steps",
    )
    add("--seeds", type=count, default=1, metavar="N", help="runs of each row, seeds 0, 1, ... (%(default)s)")
    add("--data", metavar="DIR", help="a folder in the CS224N layout, hub, or sample")
    add("--output", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="(%(default)s)")
    add("--jobs", type=count, default=1, metavar="N", help="runs at a time (%(default)s)")
    add("--threads", type=count, metavar="N", help="threads of each run (all processors, divided by --jobs)")
    add("--keep-checkpoints", action="store_true", help="keep the finished runs' checkpoints (gigabytes)")
    add("--table", action="store_true", help="only write the table of the runs in --output that are finished")
    add("--list", action="store_true", help="show the rows, with --data also what they cost; run nothing")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected names with commas between them, found {text!r}")
    return names


def _runner(options: argparse.Namespace) -> Runner:
    shared = max(1, (os.cpu_count() or 1) // options.jobs) if options.jobs > 1 else 0
    command = (sys.executable, "-c", _TRAIN, str(os.getpid()))
    return Runner(command, options.jobs, options.threads or shared, options.keep_checkpoints)


# ---- listing ----


def _list(rows: Sequence[PaperRow], plans: Mapping[str, Plan], options: argparse.Namespace) -> None:
    speed, source = _speed(plans, options)
    print(listing(rows, plans, speed))
    minutes = total_seconds(plans, speed) * options.seeds / options.jobs / 60
    print(
        f"\nAbout {minutes:,.0f} minutes at {speed:,.0f} tokens a second and run ({source}), {options.jobs} at a time,"
        f" {options.seeds} seed(s). Tokens: all work, counted as that of plain fine-tuning."
    )


def _speed(plans: Mapping[str, Plan], options: argparse.Namespace) -> tuple[float, str]:
    """Plain training tokens a second and run: what finished runs took for their work, else a short run."""
    work = seconds = 0.0
    for plan in {plan.preset: plan for plan in plans.values()}.values():
        folder = options.output / plan.preset / "seed-0"
        if (folder / "report.md").is_file() and not plan.config.pretraining.active:
            run = read_run(folder)
            if (
                run.config().get("epochs") == plan.config.epochs
                and not run.features_cached
                and run.history.epochs
            ):
                work += plan.cost.training
                seconds += float(run.history.epochs[-1]["seconds"])
    if seconds:
        return work / seconds, "as the finished runs"
    with tempfile.TemporaryDirectory() as name:
        runner, folder = _runner(options), Path(name) / "run"
        given = ["--preset", "chan-r4", "--data", "sample", "--model.pretrained", options.model]
        given += ["--curriculum.epoch_length", "30", "--epochs", "1", "--output", str(folder)]
        # The sample's sentences are half as long as the papers': as many tokens a step take twice the rows.
        given += [f"--{task}.batch_size=32" for task in ("sst", "para", "sts")]
        given += ["--threads", str(runner.threads)]
        job = Job("the short run", 0, folder, tuple(given))
        runner.run([job], lambda job, seconds: None)
        if job.failure is not None:
            raise UserError(f"the speed could not be measured: {job.failure}")
        return float(
            read_run(folder).history.epochs[-1]["tokens_per_second"]
        ), "measured now, 30 steps on the sample"


# ---- running ----


def _reproduce(
    published: Published, rows: Sequence[PaperRow], plans: Mapping[str, Plan], options: argparse.Namespace
) -> None:
    runner = _runner(options)
    jobs: dict[Path, Job] = {}
    for seed in range(options.seeds):  # every row gets its first seed before any gets its second
        for plan in plans.values():
            folder = options.output / plan.preset / f"seed-{seed}"
            if folder not in jobs:
                jobs[folder] = Job(
                    plan.preset, seed, folder, tuple(plan.arguments(seed, folder, runner.threads))
                )
                _check_settings(jobs[folder], plan)

    def finished(job: Job, seconds: float) -> None:
        outcome = "done" if job.failure is None else f"failed: {job.failure}"
        left = sum(not other.done for other in jobs.values())
        print(
            f"{job}: {outcome} ({seconds / 60:.1f} minutes; {left} of {len(jobs)} without a result)",
            flush=True,
        )
        _write(published, rows, options.output)

    page = _write(published, rows, options.output)
    runner.run(list(jobs.values()), finished)
    print(f"table: {page}")


def _check_settings(job: Job, plan: Plan) -> None:
    """Refuse to go on with, or to count, a run of other settings."""
    if not job.begun:
        return
    found = yaml.safe_load((job.folder / "config.yaml").read_text(encoding="utf-8"))
    wanted = to_dict(plan.config) | {"seed": job.seed}
    for key, (before, now) in config_differences([found, wanted]).items():
        if key in _FREE_KEYS or before is None or now is None:
            continue
        if key in ("data", "model.pretrained") and str(Path(now).expanduser().resolve()) == before:
            continue
        raise ConfigError(
            f"{job.folder} was run with {key} {before}, now it is {now}: give another --output, or delete that folder"
        )


def _write(published: Published, rows: Sequence[PaperRow], output: Path) -> Path:
    return write_reproduction(_collect(published, rows, output), output)


def _collect(published: Published, asked: Sequence[PaperRow], output: Path) -> Reproduction:
    """All results in `output`, also those of rows and seeds that this command doesn't ask for."""
    results, problems = {}, {}
    for row in published.rows.values():
        folders = sorted((output / row.run).glob("seed-*"), key=lambda folder: int(folder.name.split("-")[1]))
        jobs = [Job(row.run, int(folder.name.split("-")[1]), folder, ()) for folder in folders]
        result = read_row(row, [job.folder for job in jobs if job.done])
        if result is not None:
            results[row.name] = result
        failures = [f"seed {job.seed}: {job.failure}" for job in jobs if job.failure is not None]
        if failures:
            problems[row.name] = "; ".join(failures)
    names = {row.name for row in asked} | set(results)
    rows = [row for row in published.rows.values() if row.name in names]
    return Reproduction(published, rows, results, problems)


if __name__ == "__main__":
    run_main(main)

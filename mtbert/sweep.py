"""`python -m mtbert.sweep SPACE.yaml --output DIR`: search hyper-parameters over many training runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml

from mtbert import train
from mtbert.cli import count, run_main, train_reader
from mtbert.config import TrainConfig, to_dict, to_yaml
from mtbert.engine.durable import replace_file
from mtbert.engine.interruptions import stop_with_parent
from mtbert.engine.shared import SharedParts
from mtbert.errors import ConfigError, Interrupted, UserError
from mtbert.evaluation.comparison import config_differences
from mtbert.evaluation.sweep_report import Sweep, SweepTrial, write_sweep_report
from mtbert.ranges import span
from mtbert.sweeps.preview import preview
from mtbert.sweeps.space import Read, Space
from mtbert.sweeps.space_check import checked
from mtbert.sweeps.space_file import read_space
from mtbert.sweeps.study import Study, definition_of
from mtbert.sweeps.trial import TRIALS, Workshop
from mtbert.sweeps.wandb_log import import_wandb
from mtbert.sweeps.workers import supervise, work

BASE, SPACE = "base.yaml", "space.yaml"
"""What the sweep's folder keeps of the fixed settings, and of the search space."""
_WORKER = "import sys; from mtbert.sweep import worker; worker(int(sys.argv.pop(1)))"
_FREE_KEYS = ("cache", "device", "output", "plugins", "threads")
"""May differ between two machines, or two starts, of a study: each start has its own."""


def main(arguments: list[str]) -> None:
    """Run, list or report the sweep that the command line asks for."""
    options, given = _parser().parse_known_args(arguments)
    _refuse_strangers(options, given)
    space = _space(options, _space_path(options))
    if options.report:
        _report(_opened(options, _stored_space(options), None), options)
        return
    read = train_reader([*space.fixed, *given])
    space = checked(space, read, given)
    if options.list:
        print(preview(space, read))
        return
    if space.wandb is not None:
        import_wandb()
    base = read(())
    study = _opened(options, space, base)
    try:
        if options.jobs == 1:
            _work(options, given, space, study)
        else:
            command = (sys.executable, "-c", _WORKER, str(os.getpid()), *arguments)
            threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
            supervise(command, study, jobs=options.jobs, threads=threads, total=space.total)
    except Interrupted:
        raise
    except UserError:
        _report(study, options)
        raise
    _report(study, options)


def worker(parent: int) -> None:
    """One of several processes of a sweep. It stops with a checkpoint when the process `parent` is gone."""

    def run(arguments: list[str]) -> None:
        options, given = _parser().parse_known_args(arguments)
        space = _stored_space(options)
        _work(options, given, space, _opened(options, space, None))

    stop_with_parent(parent)
    run_main(run)


def _work(options: argparse.Namespace, given: Sequence[str], space: Space, study: Study) -> None:
    own = _own_options(given)
    if options.threads is not None and options.jobs == 1:  # of several, the environment says it
        own.append(f"--threads={options.threads}")
    read = _stored(options, own)
    shared = None if options.separate else SharedParts(splits=("train", "dev"))
    workshop = Workshop(options.output, space, study, read, train.train, shared)
    with span("sweep"):
        work(workshop, jobs=options.jobs, say=lambda line: print(line, flush=True))


# ---- the command line ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.sweep",
        usage="%(prog)s SPACE.yaml --output DIR [options] [training options]",
        description="Search hyper-parameters: grid, random or Bayesian (TPE), over any field of the configuration. Each"
        " trial is an ordinary run's folder, DIR/trials/NAME. The same command again, on this machine or on others that"
        " see DIR, takes part in the same sweep; after a kill it goes on.",
        epilog="Training options (--preset, --data, --epochs, ... as python -m mtbert.train takes them) are the fixed"
        " part of all trials, over that of SPACE.yaml. Example: python -m mtbert.sweep minilm --data DIR --output"
        " runs/sweep. --debug shows the traceback of an error.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "space",
        metavar="SPACE.yaml",
        help=f"the search space, or one that is shipped: {', '.join(sorted(shipped()))}",
    )
    add("--output", type=Path, metavar="DIR", help="folder of the sweep: study, trials, report")
    add(
        "--trials",
        type=count,
        metavar="N",
        help="number of trials; more than before goes on (method tpe, random)",
    )
    add("--jobs", type=count, default=1, metavar="N", help="trials at a time on this machine (%(default)s)")
    add("--threads", type=count, metavar="N", help="threads of each process (--jobs divide the processors)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="of the search (the trials' own is the field seed: parameters or fixed)",
    )
    add(
        "--keep",
        type=_keep,
        metavar="N",
        help="best trials that keep their checkpoints: a number, or all (3)",
    )
    add(
        "--storage",
        metavar="URL",
        help="an optuna storage, such as sqlite:///sweep.db (a journal file in DIR)",
    )
    add("--study", default="sweep", metavar="NAME", help="name of the study in the storage (%(default)s)")
    add("--wandb", metavar="PROJECT", help="log every trial to this Weights & Biases project")
    add(
        "--separate",
        action="store_true",
        help="share nothing between the trials of a process: the same scores, slower",
    )
    add(
        "--list",
        action="store_true",
        help="show the space, the number of trials and some of them; run nothing",
    )
    add("--report", action="store_true", help="only write the report of the trials so far")
    return parser


def shipped() -> dict[str, Path]:
    """The search spaces in the package, by name."""
    folder = Path(str(resources.files("mtbert") / "sweeps" / "spaces"))
    return {file.stem: file for file in folder.glob("*.yaml")}


def _space_path(options: argparse.Namespace) -> Path:
    return shipped().get(options.space, Path(options.space))


def _space(options: argparse.Namespace, path: Path) -> Space:
    """The space in a file, with what the command line says in its place."""
    space = read_space(path)
    changes = {
        name: getattr(options, name)
        for name in ("trials", "seed", "keep", "wandb")
        if getattr(options, name) is not None
    }
    return dataclasses.replace(space, **changes)


def _refuse_strangers(options: argparse.Namespace, given: Sequence[str]) -> None:
    for argument in given:
        if not argument.startswith("--"):
            continue
        name = argument.split("=")[0]
        if name in ("--resume", "--help"):
            raise ConfigError(f"{name}: a sweep has none; the same command goes on with a sweep")
    if options.output is None and not options.list:
        raise ConfigError("--output: expected the folder of the sweep, found nothing")


def _keep(text: str) -> int | str:
    if text == "all":
        return text
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 0, or all, found {text!r}")
    return value


# ---- the sweep's folder ----


def _stored_space(options: argparse.Namespace) -> Space:
    """The space that the folder keeps."""
    path = options.output / SPACE
    if not path.is_file():
        raise UserError(f"{options.output} holds no sweep ({SPACE} is missing)")
    return checked(_space(options, path), _stored(options))


def _own_options(given: Sequence[str]) -> list[str]:
    """Those of the training options of the command line that hold for this start alone."""
    own: list[str] = []
    taken = False
    for argument in given:
        if argument.startswith("--"):
            taken = argument.split("=")[0][2:] in _FREE_KEYS
        if taken:
            own.append(argument)
    return own


def _stored(options: argparse.Namespace, own: Sequence[str] = ()) -> Read:
    """Reads a trial's options over the fixed settings that the folder keeps, and over those of this start alone."""
    path = options.output / BASE
    if not path.is_file():
        raise UserError(f"{options.output} holds no sweep ({BASE} is missing)")
    return train_reader(["--config", str(path), *own])


def _opened(options: argparse.Namespace, space: Space, base: TrainConfig | None) -> Study:
    """The study in the folder. base: the fixed settings that this command asks for; None: those that are there."""
    path: Path = options.output / BASE
    study = Study(options.output, space, storage=options.storage, name=options.study)
    if base is not None:
        with study.alone():
            if path.is_file():
                _check_base(path, base)
            else:
                replace_file(path, to_yaml(dataclasses.replace(base, output=None)).encode())
        study.prepare(definition_of(space, to_dict(base)))
        replace_file(options.output / SPACE, space.path.read_bytes())
    return study


def _check_base(path: Path, base: TrainConfig) -> None:
    """Refuse to go on with other fixed settings."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, (before, now) in config_differences([found, to_dict(base)]).items():
        if key not in _FREE_KEYS:
            raise ConfigError(
                f"{path.parent}: the sweep there was begun with {key} {before}, now it is {now}: give another --output"
            )


def _report(study: Study, options: argparse.Namespace) -> None:
    space = study.space
    trials = [
        SweepTrial(
            number=trial.number,
            name=trial.name,
            state=trial.state,
            score=trial.score,
            values=trial.values,
            curve=trial.curve,
            tags=[str(tag) for tag in trial.facts.get("tags", [])],
            scores=trial.facts.get("scores", {}),
            seconds=float(trial.facts.get("seconds", 0.0)),
            reason=str(trial.facts.get("reason", "")),
            folder=options.output / TRIALS / trial.name,
        )
        for trial in study.trials()
    ]
    importances, conditional, method = study.importances()
    about = {parameter.name: parameter.describe() for parameter in space.parameters}
    logs = {parameter.name for parameter in space.parameters if parameter.log}
    sweep = Sweep(
        folder=options.output,
        space=Path(options.space).name,
        method=space.method,
        pruner=space.pruner,
        parameters=about,
        log_scales=logs,
        trials=trials,
        importances=importances,
        conditional=conditional,
        importance_method=method,
    )
    print(f"report: {write_sweep_report(sweep)}")


if __name__ == "__main__":
    run_main(main)

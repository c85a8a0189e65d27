"""`python -m mtbert.evaluate RUN [--data DIR]`: score a run's best checkpoint on labelled tables."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from mtbert import load
from mtbert.cli import add_trust, config_from_file, run_main
from mtbert.data.tables import read_own_table
from mtbert.engine.build import prepare_data
from mtbert.engine.finish import predict_split, swap_pairs
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.precision import product_settings
from mtbert.engine.predictor import Predictor
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.assessment import Assessment, assess, details
from mtbert.evaluation.baselines import baselines
from mtbert.evaluation.results import Results, results, results_table
from mtbert.kernels.dispatch import use_backend
from mtbert.tasks.loading import load_tables


def main(arguments: list[str]) -> None:
    """Print the table of results, and with `--json` write every score to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.evaluate",
        description="Score the best checkpoint of a run, with bootstrap intervals, calibration and baselines.",
        epilog="--debug shows the traceback of an error.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data", help="folder in the CS224N layout, sample or hub (default: the run's own)")
    parser.add_argument("--split", choices=("train", "dev", "test"), help="table to score (default: dev)")
    parser.add_argument("--task", help="with --file: the task that the table is of")
    parser.add_argument(
        "--file",
        type=Path,
        help="a table of your own with the task's columns, separated by tabs or commas; a column of ids may be missing",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all scores to FILE as JSON")
    add_trust(parser)
    options = parser.parse_args(arguments)
    if (options.task is None) != (options.file is None):
        raise ConfigError(
            "--task and --file belong together: the table of one's own, and the task that it is of"
        )
    if options.file is not None and (options.data or options.split):
        raise ConfigError(
            "--data and --split are for the tables of a folder; with --file there is one table alone"
        )
    with logging_to(None):
        run = RunFolder.open(options.run)
        if options.file is not None:
            _own_table(run, options)
        else:
            _folder(run, options)


def _own_table(run: RunFolder, options: argparse.Namespace) -> None:
    """Score a table of the user's own."""
    task, file = options.task, options.file
    model = load(run.path, device=options.device, trust_plugins=options.trust_plugins)
    table = read_own_table(file, task, model.task(task).layout, labelled=True)
    for problem in table.problems:
        print(f"left out: {problem}", file=sys.stderr)
    found = model.evaluate(task, table, resamples=model.config.evaluation.resamples if model.config else 1000)
    print(f"{run.path}, step {model.step}, {file}\n\n{found.to_text()}")
    if options.json is not None:
        facts = {"file": str(file), "left_out": len(table.problems), "step": model.step}
        run.write_json(options.json, facts | {"tasks": {task: found.to_json()}})


def _folder(run: RunFolder, options: argparse.Namespace) -> None:
    """Score the tables of a folder."""
    split = options.split or "dev"
    config = config_from_file(run.config_path, trust_plugins=options.trust_plugins)
    trained_on = config.data
    if options.data is not None:
        config = dataclasses.replace(config, data=options.data)
    loaded = load_run(run, config, device=options.device)
    with (
        memory_errors(config.max_tokens),
        product_settings(loaded.config.precision),
        use_backend(None if config.kernels == "auto" else config.kernels),
    ):
        chosen_here = split == "dev" and same_data(trained_on, config.data)
        halved = chosen_here and config.evaluation.selection == "half"
        outcome, assessments = evaluate(loaded, split, halved=halved)
    print(f"{run.path}, step {loaded.step}, {split} of {config.data}\n")
    print(results_table(outcome))
    for each in assessments.values():
        print("\n\n".join([f"\n{each.task.title}", *details(each)]))
    if options.json is not None:
        scores = {name: each.to_json() for name, each in assessments.items()}
        joint = {"overall": outcome.overall, "mean": outcome.mean}
        run.write_json(options.json, {"split": split, "step": loaded.step, "tasks": scores, **joint})


def same_data(first: str, second: str) -> bool:
    """Whether two values of `--data` mean the same tables."""
    return first == second or Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def evaluate(loaded: LoadedRun, split: str, *, halved: bool = False) -> tuple[Results, dict[str, Assessment]]:
    """Scores of every task of the run on `split`. Raises DataError when a table is missing or unlabelled.

    halved: one half of these examples chose the checkpoint, so that the result is of the other.
    """
    config = loaded.config
    tables = load_tables(config.data, list(loaded.tasks.values()), required=(split,))
    data = prepare_data(config, tables, loaded.tokeniser)
    predictor = Predictor(
        loaded.model,
        loaded.tokeniser,
        loaded.machine,
        loaded.tasks,
        config.task,
        max_tokens=config.max_tokens,
    )
    base, predictions, assessments = {}, {}, {}
    for name, task in loaded.tasks.items():
        examples = data[name][split]
        if examples.labels is None:
            raise DataError(f"{examples.table.path}: has no labels, so that it cannot be scored")
        train = data[name]["train"].labels if "train" in data[name] else None
        base[name] = baselines(task, train, examples.labels)
        predictions[name] = predict_split(loaded.forward, task, examples, split, max_tokens=config.max_tokens)
        assessments[name] = assess(
            task,
            predictions[name],
            swaps=swap_pairs(predictor, task, examples.table) if task.is_pair else None,
            baselines=base[name],
            resamples=config.evaluation.resamples,
            halved=halved,
        )
    resamples = config.evaluation.resamples
    found = results(
        loaded.tasks, predictions, baselines=base, split=split, resamples=resamples, halved=halved
    )
    return found, assessments


if __name__ == "__main__":
    run_main(main)

"""`python -m mtbert.evaluate RUN [--data DIR]`: score a run's best checkpoint on labelled tables."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from mtbert.cli import add_trust, config_from_file, run_main
from mtbert.engine.build import prepare_data
from mtbert.engine.finish import predict_split
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.precision import product_settings
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.errors import DataError
from mtbert.evaluation.baselines import baselines
from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.results import Results, class_table_rows, results, results_table
from mtbert.evaluation.table import table
from mtbert.tasks.loading import load_tables


def main(arguments: list[str]) -> None:
    """Print the table of results, and with `--json` write every score to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.evaluate",
        description="Score the best checkpoint of a run, with bootstrap intervals and baselines.",
        epilog="--debug shows the traceback of an error.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--data", help="folder in the CS224N layout, sample or hub (default: the run's own)")
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), default="dev", help="table to score (dev)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all scores to FILE as JSON")
    add_trust(parser)
    options = parser.parse_args(arguments)
    with logging_to(None):
        run = RunFolder.open(options.run)
        config = config_from_file(run.config_path, trust_plugins=options.trust_plugins)
        trained_on = config.data
        if options.data is not None:
            config = dataclasses.replace(config, data=options.data)
        loaded = load_run(run, config, device=options.device)
        with memory_errors(config.max_tokens), product_settings(loaded.config.precision):
            chosen_here = options.split == "dev" and same_data(trained_on, config.data)
            halved = chosen_here and config.evaluation.selection == "half"
            outcome = evaluate(loaded, options.split, halved=halved)
    print(f"{run.path}, step {loaded.step}, {options.split} of {config.data}\n")
    print(results_table(outcome))
    for name, task in outcome.tasks.items():
        if class_names(task):
            print(f"\n{task.title}")
            print(table(*class_table_rows(outcome.scores[name])))
    if options.json is not None:
        scores = {name: entry.to_json() for name, entry in outcome.scores.items()}
        joint = {"overall": outcome.overall, "mean": outcome.mean}
        run.write_json(options.json, {"split": options.split, "step": loaded.step, "tasks": scores, **joint})


def same_data(first: str, second: str) -> bool:
    """Whether two values of `--data` mean the same tables."""
    return first == second or Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def evaluate(loaded: LoadedRun, split: str, *, halved: bool = False) -> Results:
    """Scores of every task of the run on `split`. Raises DataError when a table is missing or unlabelled.

    halved: one half of these examples chose the checkpoint, so that the result is of the other.
    """
    config = loaded.config
    tables = load_tables(config.data, list(loaded.tasks.values()), required=(split,))
    data = prepare_data(config, tables, loaded.tokeniser)
    predictions = {}
    for name, task in loaded.tasks.items():
        if data[name][split].labels is None:
            raise DataError(f"{data[name][split].table.path}: has no labels, so that it cannot be scored")
        predictions[name] = predict_split(
            loaded.forward, task, data[name][split], split, max_tokens=config.max_tokens
        )
    return results(
        loaded.tasks,
        predictions,
        baselines={
            name: baselines(
                task,
                data[name]["train"].labels if "train" in data[name] else None,
                data[name][split].labels,
            )
            for name, task in loaded.tasks.items()
        },
        split=split,
        resamples=config.evaluation.resamples,
        halved=halved,
    )


if __name__ == "__main__":
    run_main(main)

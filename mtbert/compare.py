"""`python -m mtbert.compare RUN RUN ...`: scores, paired differences and curves of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mtbert.cli import add_trust, load_plugins_of_run, run_main
from mtbert.evaluation.bootstrap import RESAMPLES
from mtbert.evaluation.comparison import compare_runs, write_comparison
from mtbert.evaluation.run import read_run
from mtbert.tasks.registry import TASKS


def main(arguments: list[str] | None = None) -> None:
    """Compare the runs that the command line names with the first of them; print and write the result."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.compare",
        description="Compare runs: dev scores, paired-bootstrap differences from the first run, curves.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder; at least two")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("comparison"),
        metavar="DIR",
        help="folder of the result (%(default)s)",
    )
    parser.add_argument(
        "--resamples",
        type=_positive,
        default=RESAMPLES,
        metavar="N",
        help="bootstrap resamples (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (%(default)s)"
    )
    add_trust(parser)
    options = parser.parse_args(arguments)
    for folder in options.runs:
        path = folder / "config.yaml"
        load_plugins_of_run(path, read_run(folder).config(), trusted=options.trust_plugins)
    comparison = compare_runs(options.runs, TASKS, resamples=options.resamples, seed=options.seed)
    page = write_comparison(comparison, options.output)
    print(comparison.to_text())
    print(f"\nWritten to {page}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


if __name__ == "__main__":
    run_main(main)

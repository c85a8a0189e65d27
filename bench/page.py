"""The records of a folder as one page, README.md: goals met and missed, tables, plots, and why a goal was missed.

python -m bench.page                     # of bench/results; pytest writes it too, where it records something
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.comparison import MEMORY, Goal
from bench.page_plots import ALL_PAIRS, SPEED, pairs_plot, scaling_plot, speed_plot
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.profile import OperationTime, ProfileFacts
from mtbert.evaluation.table import Cell, markdown_table

PAGE = "README.md"
_KNOWN = {MEMORY: "activations, KiB a token", "padding_share": "padding"}
"""Figures that have a column; others are named in the last one."""
_OPERATIONS = 6
"""Rows of the table of where a step's time goes."""
_HEAD = """# What was measured

Written by `python -m bench.page` from the records beside it; [how it is measured](../README.md). Rates are medians over
alternating rounds (first to third quartile), ratios those of neighbours within a round. **Of the limit**: the share
of the matrix-product rate measured in the same rounds. Activations: the peak of forward and backward passes without
weights, gradients and optimizer state, over their useful tokens. A goal that was missed stands as missed, with what
its step spent its time on.
"""


def write_page(folder: Path) -> Path:
    """README.md of a folder of records, and the plots that it shows; returns the page's path.

    Comparisons of kernels have pages of their own. Raises ValueError for records of another format.
    """
    parts = [_HEAD]
    for path in sorted(folder.glob("*.json")):
        record = records.read_file(path)
        comparisons = {
            name: found
            for name, found in record["comparisons"].items()
            if "tokens_per_step" in found["measured"]
        }
        comparisons = {name: found for name, found in comparisons.items() if "cases" in found}
        runs = record.get("speedruns", {})
        if comparisons or runs:
            parts.append(_device(record["device"], comparisons, runs, path))
    page = folder / PAGE
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _device(
    device: str, comparisons: Mapping[str, dict[str, Any]], runs: Mapping[str, dict[str, Any]], path: Path
) -> str:
    """The section of one device; its plots are written beside the record."""
    lines = [f"## {escape(device)}", ""]
    goals = _goal_rows(comparisons, runs)
    if goals:
        headers = ["comparison", "goal", "wanted", "reached", ""]
        lines += ["### Goals", "", markdown_table(headers, goals), ""]
    for name, found in runs.items():
        lines += _speedrun(name, found)
    speeds = {name: found for name, found in comparisons.items() if name in SPEED}
    scalings = {name: found for name, found in comparisons.items() if name.startswith("scaling: ")}
    pairs = {name: found for name, found in comparisons.items() if name.startswith(ALL_PAIRS)}
    plots = (("speed", speeds, speed_plot), ("scaling", scalings, scaling_plot), ("pairs", pairs, pairs_plot))
    for suffix, chosen, plot in plots:
        if chosen:
            image = plot(device, chosen, path.with_name(f"{path.stem}-{suffix}.png"))
            lines += [f"![{suffix}]({image.name})", ""]
    for name, found in comparisons.items():
        lines += _comparison(name, found)
    return "\n".join(lines)


def _goal_rows(
    comparisons: Mapping[str, dict[str, Any]], runs: Mapping[str, dict[str, Any]]
) -> list[list[Cell]]:
    """Every goal that is set, with what was reached; goals of wall-clock seconds apart."""
    rows: list[list[Cell]] = []
    for name, found in comparisons.items():
        for outcome in found["goals"]:
            if outcome["met"] is None:
                continue
            goal = Goal(**outcome["goal"])
            form = ",.0f" if goal.to is None and goal.of == "speed" else ".2f"
            bounds = (("at least", goal.at_least), ("at most", goal.at_most))
            wanted = " and ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)
            subject = goal.subject + (", useful tokens/s" if form == ",.0f" else "")
            verdict = "met" if outcome["met"] else "**missed**"
            rows.append([escape(name), escape(subject), wanted, spread_text(outcome["ratio"], form), verdict])
    for name, found in runs.items():
        if found["met"] is not None:
            wanted = f"overall {found['target']} in under {found['limit']:g} s"
            reached = f"overall {found['score']['median']:.3f} in {found['seconds']['median']:.1f} s"
            rows.append(
                [escape(name), "time to a score", wanted, reached, "met" if found["met"] else "**missed**"]
            )
    return rows


def _comparison(name: str, found: Mapping[str, Any]) -> list[str]:
    """A comparison's table, and where the time of those goes that missed a goal."""
    cases = found["cases"]
    shown = [figure for figure in _KNOWN if any(figure in case["figures"] for case in cases)]
    headers = [
        "side",
        f"{found.get('unit', 'useful tokens')}/s",
        f"x {found['baseline']}",
        "of the limit",
        *(_KNOWN[f] for f in shown),
        "",
    ]
    rows: list[list[Cell]] = []
    for case in cases:
        share, figures = case["limit_share"], case["figures"]
        others = [
            f"{key.replace('_', ' ')} {value:,.4g}" for key, value in figures.items() if key not in _KNOWN
        ]
        rows.append(
            [
                escape(case["name"]),
                spread_text(case["tokens_per_second"], ",.0f"),
                spread_text(case["ratio"], ".2f"),
                "" if share is None else f"{share['median']:.0%}",
                *(_figure(figure, figures.get(figure)) for figure in shown),
                ", ".join(others),
            ]
        )
    lines = [f"### {escape(name)}", "", _measured(found["measured"]), "", markdown_table(headers, rows), ""]
    ratios = [
        f"{escape(Goal(**outcome['goal']).subject)}: {spread_text(outcome['ratio'], '.2f')}"
        for outcome in found["goals"]
        if outcome["met"] is None
    ]
    if ratios and not name.startswith("scaling: "):
        lines += [*(f"- {ratio}" for ratio in ratios), ""]
    if found["left_out"]:
        lines += [f"Left out: {escape('; '.join(found['left_out']))}.", ""]
    for side, values in found.get("profiles", {}).items():
        lines += _profile(side, ProfileFacts(values))
    return lines


def _profile(side: str, profile: ProfileFacts) -> list[str]:
    """Where a step of the side spends its time."""
    operations = profile.operations
    rest = profile.step - sum(each.total for each in operations[:_OPERATIONS])
    rows: list[list[Cell]] = [_operation(each) for each in operations[:_OPERATIONS]]
    rows.append(["all else", f"{1e3 * rest:,.1f}", f"{rest / profile.step:.0%}", "", ""])
    headers = ["operation", "ms a step", "of the step", "of the products' limit", "of the copy's limit"]
    return [f"Where a step of {escape(side)} goes:", "", markdown_table(headers, rows), ""]


def _operation(each: OperationTime) -> list[Cell]:
    shares = [each.share, each.of_products, each.of_copy]
    return [escape(each.name), f"{1e3 * each.total:,.1f}", *("" if s is None else f"{s:.0%}" for s in shares)]


def _speedrun(name: str, found: Mapping[str, Any]) -> list[str]:
    headers = ["seed", "steps", "seconds to the target", "seconds in all", "overall at the end"]
    rows: list[list[Cell]] = [
        [
            str(run["seed"]),
            run["steps"],
            "-" if run["seconds_to_target"] is None else f"{run['seconds_to_target']:.1f}",
            f"{run['seconds']:.1f}",
            f"{run['score']:.3f}",
        ]
        for run in found["runs"]
    ]
    said = [f"### {escape(name)}", "", _measured(found["measured"]), ""]
    if found["note"]:
        said += [escape(found["note"]), ""]
    return [*said, f"![score against seconds]({found['plot']})", "", markdown_table(headers, rows), ""]


def _measured(facts: Mapping[str, Any]) -> str:
    """On what, in a line."""
    tokens = facts["tokens_per_step"]
    sizes = f"{tokens:,} useful tokens a step, " if isinstance(tokens, int) else ""
    load = facts.get("load")
    busy = "" if not load else f", load {' to '.join(str(each) for each in load)}"
    versions = ", ".join(
        f"{package} {facts['versions'][package]}"
        for package in ("torch", "transformers", "peft", "sentence-transformers")
        if package in facts["versions"]
    )
    return escape(
        f"{facts['encoder']}, {facts['source']}, {sizes}{facts['threads']} threads{busy}; commit {facts['git']},"
        f" {facts['created']}; {versions}"
    )


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if name == "padding_share" else f"{value:,.1f}"


def spread_text(spread: Mapping[str, Any], form: str) -> str:
    """Median and quartiles of a record."""
    if spread["repeats"] == 1:
        return f"{spread['median']:{form}}"
    return f"{spread['median']:{form}} ({spread['low']:{form}} to {spread['high']:{form}})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.page", description="The page of a folder of records."
    )
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="the folder")
    print(write_page(parser.parse_args(arguments).results))


if __name__ == "__main__":
    main()

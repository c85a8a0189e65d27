"""The report of a sweep: what each trial came to, which parameters mattered, and the best configuration as a preset."""

from __future__ import annotations

import csv
import html
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtbert.engine.environment import code_version
from mtbert.errors import UserError
from mtbert.evaluation.files import write_text
from mtbert.evaluation.markdown import escape, image_links
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.plots.sweep_plots import (
    curves_plot,
    history_plot,
    importance_plot,
    parallel_plot,
    slice_plot,
)
from mtbert.evaluation.run import read_run
from mtbert.evaluation.table import Cell, markdown_table

SHOWN = 20
REASONS_SHOWN = 10


@dataclass(frozen=True)
class SweepTrial:
    """What is known of one trial."""

    number: int
    name: str
    state: str
    """waiting, running, complete, pruned or failed."""
    score: float | None
    """The best dev score; of a pruned trial the best until then."""
    values: Mapping[str, Any]
    """Of its parameters."""
    curve: Mapping[int, float]
    """Dev scores by number of the evaluation."""
    tags: Sequence[str]
    scores: Mapping[str, float]
    """Of the tasks and joint ones, at the best evaluation."""
    seconds: float
    reason: str
    folder: Path


@dataclass(frozen=True)
class Sweep:
    """A sweep as its report sees it."""

    folder: Path
    space: str
    """The file of the search space."""
    method: str
    pruner: str
    parameters: Mapping[str, str]
    """By name: what it ranges over."""
    log_scales: Collection[str]
    trials: Sequence[SweepTrial]
    importances: Mapping[str, float]
    """Of the parameters that all complete trials have."""
    conditional: Mapping[str, float]
    """Of the others, each among the complete trials that have it."""
    importance_method: str
    """How they were found, or why not."""

    @property
    def complete(self) -> list[SweepTrial]:
        """Complete trials, the best first."""
        found = [trial for trial in self.trials if trial.state == "complete" and trial.score is not None]
        return sorted(found, key=lambda trial: (-(trial.score or 0.0), trial.number))

    @property
    def ranked(self) -> list[SweepTrial]:
        """Complete trials, then pruned ones, each the best first, then all others."""
        order = {"complete": 0, "pruned": 1, "failed": 2, "running": 3, "waiting": 4}
        score = {trial.number: -1e9 if trial.score is None else trial.score for trial in self.trials}
        return sorted(self.trials, key=lambda trial: (order[trial.state], -score[trial.number], trial.number))


def write_sweep_report(sweep: Sweep) -> Path:
    """Write report.md, trials.csv, trials.html, best.yaml and plots/ into the sweep's folder; returns the report."""
    folder = sweep.folder
    headers, rows = _rows(sweep, sweep.ranked)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    write_text(folder / "trials.csv", text.getvalue())
    write_text(folder / "trials.html", _page(sweep, headers, rows))
    plots = _plots(sweep)
    best = _best(sweep)
    sections = [
        f"# Sweep {escape(folder.resolve().name)}",
        _facts(sweep),
        "## Trials\n\n" + _table(sweep),
        best,
        image_links(plots, folder, ("history", "curves")),
        "## Parameters\n\n" + _parameters(sweep),
        image_links(plots, folder, ("importance", "parallel", "slices")),
        _failures(sweep),
    ]
    return write_text(folder / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def _facts(sweep: Sweep) -> str:
    counts = Counter(trial.state for trial in sweep.trials)
    order = ("complete", "pruned", "failed", "running", "waiting")
    seconds = sum(trial.seconds for trial in sweep.trials)
    lines = [
        f"- search space: {escape(sweep.space)}, method {sweep.method}, pruner {sweep.pruner}",
        f"- trials: {len(sweep.trials)} ({', '.join(f'{counts[state]} {state}' for state in order if counts[state])})",
        f"- time of the trials together: {seconds / 60:.1f} minutes",
        f"- commit: {escape(code_version())}",
    ]
    if any(_halved(trial) for trial in sweep.complete[:1]):
        lines.append(
            "- scores: of the half of dev that chooses checkpoints and trials; a trial's own report has those of the"
            " other half, on which nothing was chosen"
        )
    else:
        lines.append(
            "- scores: of dev, the best evaluation of each trial. Trials and checkpoints are chosen on them, so"
            " that the best one's is optimistic (evaluation.selection half keeps a half apart)"
        )
    return "\n".join(lines)


def _halved(trial: SweepTrial) -> bool:
    try:
        return read_run(trial.folder).halved
    except UserError:  # a trial of another machine has no folder here
        return False


def _rows(sweep: Sweep, trials: Sequence[SweepTrial]) -> tuple[list[str], list[list[Cell]]]:
    tasks = list(dict.fromkeys(name for trial in sweep.trials for name in trial.scores))
    headers = ["trial", "state", "score", *tasks, *sweep.parameters, "seconds", "name"]
    rows: list[list[Cell]] = []
    for trial in trials:
        scores = [_rounded(trial.scores.get(task)) for task in tasks]
        values = [_cell(trial.values.get(name)) for name in sweep.parameters]
        rows.append(
            [
                trial.number,
                trial.state,
                _rounded(trial.score),
                *scores,
                *values,
                round(trial.seconds, 1),
                trial.name,
            ]
        )
    return headers, rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _table(sweep: Sweep) -> str:
    shown = [trial for trial in sweep.ranked if trial.score is not None][:SHOWN]
    if not shown:
        return "No trial has a score."
    headers, rows = _rows(sweep, shown)
    keep = [place for place, name in enumerate(headers) if name != "name"]
    texts: list[list[Cell]] = []
    for row in rows:
        cells: list[Cell] = []
        for place in keep:
            cell = row[place]
            if isinstance(cell, float):
                digits = (
                    f"{cell:.4f}" if 2 <= place < len(headers) - 2 - len(sweep.parameters) else f"{cell:g}"
                )
                cells.append(digits)
            else:
                cells.append(escape(cell) if isinstance(cell, str) else cell)
        texts.append(cells)
    more = f"The best {len(shown)} of {len(sweep.trials)}. " if len(shown) < len(sweep.trials) else ""
    return (
        markdown_table([escape(headers[place]) for place in keep], texts)
        + f"\n\n{more}All of them: [trials.html](trials.html), whose columns sort, and [trials.csv](trials.csv). Each"
        " trial is a run's folder, trials/NAME."
    )


def _best(sweep: Sweep) -> str:
    """best.yaml, and what the report says of it."""
    if not sweep.complete:
        return ""
    best = sweep.complete[0]
    path = best.folder / "config.yaml"
    if not path.is_file():
        return f"The best trial is {best.number}, in the folder of another machine."
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    head = (
        f"# The best of {len(sweep.trials)} trials of {sweep.space}: trial {best.number}, dev score {best.score:.4f}.\n"
        "# Run it again with: python -m mtbert.train --config best.yaml\n"
    )
    write_text(sweep.folder / "best.yaml", head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    settings = ", ".join(f"{name} {_cell(value)}" for name, value in best.values.items())
    return (
        f"The best is trial {best.number} with {best.score:.4f}: {escape(settings)}. It is a preset,"
        " [best.yaml](best.yaml): `python -m mtbert.train --config best.yaml` runs it again."
    )


def _parameters(sweep: Sweep) -> str:
    rows: list[list[Cell]] = []
    for name, about in sweep.parameters.items():
        share = sweep.importances.get(name, sweep.conditional.get(name))
        text = None if share is None else f"{share:.3f}" + ("" if name in sweep.importances else " \\*")
        rows.append([escape(name), escape(about), text])
    note = f"Importance: {escape(sweep.importance_method)}"
    if sweep.importances or sweep.conditional:
        note += " of the complete trials: the share of a parameter in what makes their scores differ"
    if sweep.conditional:
        note += "; \\* only among the trials that have the parameter, so not to be added to the others"
    return f"{markdown_table(['parameter', 'range', 'importance'], rows)}\n\n{note}."


def _failures(sweep: Sweep) -> str:
    reasons = Counter(trial.reason for trial in sweep.trials if trial.state == "failed")
    if not reasons:
        return ""
    lines = [
        f"- {count} of {len(sweep.trials)}: {escape(reason, 400)}" for reason, count in reasons.most_common()
    ]
    more = (
        []
        if len(lines) <= REASONS_SHOWN
        else [f"- and {len(lines) - REASONS_SHOWN} reasons more (trials.csv)"]
    )
    return "## Failed trials\n\n" + "\n".join([*lines[:REASONS_SHOWN], *more])


def _plots(sweep: Sweep) -> dict[str, Path]:
    source = Source(sweep.folder.resolve().name, code_version())
    scored = [trial for trial in sweep.trials if trial.score is not None]
    if not scored:
        return {}
    made = {
        "history": history_plot(scored, source),
        "curves": curves_plot(scored, source),
        "parallel": parallel_plot(scored, list(sweep.parameters), sweep.log_scales, source),
        "slices": slice_plot(scored, list(sweep.parameters), sweep.log_scales, source),
    }
    if sweep.importances or sweep.conditional:
        made["importance"] = importance_plot(
            sweep.importances, sweep.conditional, sweep.importance_method, source
        )
    return {
        name: save(figure, sweep.folder / "plots" / f"{name}.png") for name, figure in made.items() if figure
    }


# ---- the page whose columns sort ----

_STYLE = """body { font: 14px sans-serif; margin: 2em; } table { border-collapse: collapse; }
th, td { padding: 3px 9px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { cursor: pointer; background: #f4f4f4; position: sticky; top: 0; } th[data-order]::after { content: " \\2193"; }
th[data-order="1"]::after { content: " \\2191"; } td.text, th.text { text-align: left; }
tr.failed td, tr.pruned td { color: #777; }"""

_SCRIPT = """for (const [place, head] of [...document.querySelectorAll("th")].entries()) head.onclick = () => {
  const body = document.querySelector("tbody"), order = head.dataset.order === "-1" ? 1 : -1;
  document.querySelectorAll("th").forEach(other => delete other.dataset.order);
  head.dataset.order = order;
  const key = row => row.cells[place].dataset.value;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = !isNaN(x) && !isNaN(y);
    return order * (numbers ? x - y : x.localeCompare(y));
  });
  body.append(...rows);
};"""


def _page(sweep: Sweep, headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """All trials as a page that needs nothing else; a click on a column's head sorts by it."""
    text = [
        all(row[place] is None or isinstance(row[place], str) for row in rows)
        for place in range(len(headers))
    ]
    state = headers.index("state")

    def cell(value: Cell, place: int) -> str:
        shown = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        kind = ' class="text"' if text[place] else ""
        return f'<td{kind} data-value="{html.escape(shown)}">{html.escape(shown)}</td>'

    head = "".join(
        f"<th{' class=text' if text[place] else ''}>{html.escape(name)}</th>"
        for place, name in enumerate(headers)
    )
    body = "\n".join(
        f'<tr class="{html.escape(str(row[state]))}">'
        f"{''.join(cell(value, place) for place, value in enumerate(row))}</tr>"
        for row in rows
    )
    title = html.escape(f"Sweep {sweep.folder.resolve().name}")
    about = html.escape(json.dumps(dict(sweep.parameters), ensure_ascii=False))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'</head>\n<body data-space="{about}"><h1>{title}</h1>\n<p>A click on a column sorts by it.</p>\n'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n<script>{_SCRIPT}</script></body></html>\n"
    )

"""reproduction.md, reproduction.csv and their figure: our runs beside the papers' rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtbert.errors import UserError
from mtbert.evaluation.files import write_text
from mtbert.evaluation.forgetting import backward_transfer, phase_rows, phases
from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import metric_fields
from mtbert.evaluation.plots.reproduction import reproduction_plot
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.published import PaperRow, Published
from mtbert.evaluation.reproduction import RowResult, judge
from mtbert.evaluation.reproduction_table import (
    COLUMNS,
    condition_rows,
    csv_text,
    markdown,
    score_rows,
)
from mtbert.evaluation.run import read_run
from mtbert.evaluation.table import Cell, markdown_table
from mtbert.evaluation.transfer import transfer
from mtbert.tasks.registry import TASKS

PAGE, CSV, PLOT = "reproduction.md", "reproduction.csv", Path("plots") / "reproduction.png"
_PHASES_SHOWN = 9

_HOW = """\
- Published are the papers' dev figures, with the formula of their score: mean = (SST + paraphrase + STS) / 3, overall =
  (SST + paraphrase + (STS + 1) / 2) / 3, or one task's own figure. Ours is the best epoch on dev by the same formula,
  the mean over the seeds ± their deviation (n - 1). A published score marked * fits neither formula; the difference is
  then from the row's formula of its columns.
- Our 95% interval says how far our score would vary with other dev examples: a bootstrap over those of our dev set (the
  mean of the seeds' intervals).
- Within noise: chance alone may explain the difference, at the level of 95%. Counted are the choice of dev examples,
  ours and the paper's (as its dev set's size gives it), and where several seeds ran, the noise of training: our
  deviation over them stands for the paper's too. With one seed the noise of training is unknown and not counted, and a
  difference beyond the rest is marked so. Higher or lower may come from the encoder or from a reading of the paper as
  well as from the method.
- A run shorter than the paper's (column `epochs`) gets no verdict: a lower score shows too little training, not a row
  that fails to reproduce.
- A row is not comparable where training saw fewer than 99% of the different Quora pairs that the paper's schedule goes
  through (of the course's {quora:,}; the column `training rows` has the size of our table).
- Mean and deviation below a table are over the rows with both figures; rows that share one run of ours count once, with
  the mean of their published figures."""


@dataclass(frozen=True)
class Reproduction:
    """Everything that the page is made of."""

    published: Published
    rows: Sequence[PaperRow]
    """The rows that are asked for, in order."""
    results: Mapping[str, RowResult]
    """By row; those with at least one finished run."""
    problems: Mapping[str, str]
    """By row: why a run of it failed."""


def write_reproduction(found: Reproduction, output: Path) -> Path:
    """Write the page, the table as CSV and the figure into `output`; returns the page's path."""
    done = [found.results[row.name] for row in found.rows if row.name in found.results]
    write_text(output / CSV, csv_text(found.rows, found.results, found.problems, found.published))
    parts = ["# The papers' rows, run again", _intro(found, done)]
    if any(judge(result, found.published) for result in done):
        commits = sorted({read_run(result.seeds[0].folder).git for result in done})
        figure = reproduction_plot(done, found.published, Source("reproduction", ", ".join(commits)))
        save(figure, output / PLOT)
        parts.append(f"![published and ours]({PLOT.as_posix()})")
    for paper, title in found.published.titles.items():
        parts += _paper(title, [result for result in done if result.row.paper == paper], found.published)
    parts += [_by_epoch(done), _transfer(found), _forgetting(done), _missing(found)]
    return write_text(output / PAGE, "\n\n".join(filter(None, parts)) + "\n")


def _intro(found: Reproduction, done: Sequence[RowResult]) -> str:
    lines = [
        f"{len(done)} of {len(found.rows)} rows have a finished run.",
        _HOW.format(quora=found.published.train["para"]),
    ]
    changed = [r for r in done if r.schedule.changed(r.row.schedule)]
    if changed:
        lines.append(
            f"> **Shortened.** {len(changed)} of the {len(done)} rows below trained for another length than the paper's"
            " (column `epochs`). Their differences say what short runs reach, not whether the rows reproduce."
        )
    contaminated = {str(read_run(r.seeds[0].folder).info.get("contamination") or "") for r in done} - {""}
    lines += [f"> **Contamination.** {escape(text)}" for text in sorted(contaminated)]
    if any(result.seeds[0].synthetic for result in done):
        lines.append("> **Synthetic data.** Runs on the built-in sample say nothing about real text.")
    return "\n\n".join(lines)


def _paper(title: str, done: Sequence[RowResult], published: Published) -> list[str]:
    rows = [result for result in done if result.row.single_of is None]
    if not rows:
        return []
    return [
        f"## {escape(title)}",
        markdown(*score_rows(rows, published)),
        markdown(*condition_rows(rows, published)),
    ]


# ---- beside the table ----


def _by_epoch(done: Sequence[RowResult]) -> str:
    parts = []
    for result in done:
        if not result.row.by_epoch:
            continue
        ours = {
            round(line["epoch"]): line
            for line in read_run(result.seeds[0].folder).history.evaluations
            if float(line["epoch"]).is_integer()
        }
        names = (*COLUMNS, "overall")
        rows: list[list[Cell]] = []
        for place in range(len(result.row.by_epoch["overall"])):
            line = ours.get(place + 1)
            theirs = [result.row.by_epoch[name][place] for name in names]
            rows.append([place + 1, *theirs, *(_dev_score(line, name) for name in names)])
        headers = ["epoch", *(f"published {n}" for n in names), *(f"our {n}" for n in names)]
        parts.append(f"### {result.row.name}\n\n{markdown_table(headers, rows)}")
    return "\n\n".join(["## After every epoch, on dev", *parts]) if parts else ""


def _dev_score(line: Mapping[str, Any] | None, name: str) -> float | None:
    if line is None:
        return None
    if name == "overall":
        return line.get("overall")
    return line["dev"][name].get(metric_fields(TASKS[name])[0])


def _transfer(found: Reproduction) -> str:
    parts = []
    by_name = found.published.rows
    for name in dict.fromkeys(row.single_of for row in by_name.values() if row.single_of):
        singles = {
            task: found.results[row.name].seeds[0].folder
            for row in by_name.values()
            if row.single_of == name and row.name in found.results
            for task in [row.formula]
        }
        if name in found.results and singles:
            try:
                text = transfer(found.results[name].seeds[0].folder, singles, TASKS).to_markdown()
            except UserError as error:
                text = escape(str(error))
            else:
                text += _lengths(found, name)
            parts.append(f"### {name}\n\n{text}")
    return "\n\n".join(["## Transfer: multitask minus single-task", *parts]) if parts else ""


def _lengths(found: Reproduction, name: str) -> str:
    """A warning where a single task trained for another number of steps than the row: that is not transfer alone."""
    steps = found.results[name].seeds[0].steps
    others = {
        f"{row.name} {result.seeds[0].steps:,}"
        for row in found.published.rows.values()
        if row.single_of == name and (result := found.results.get(row.name)) is not None
        if not math.isclose(result.seeds[0].steps, steps, rel_tol=0.01)
    }
    if not others:
        return ""
    return (
        f"\n\n**Not the same training**: {escape(name)} took {steps:,} steps, {escape(', '.join(sorted(others)))}; the"
        " differences are not transfer alone."
    )


def _forgetting(done: Sequence[RowResult]) -> str:
    parts = []
    for result in done:
        run = read_run(result.seeds[0].folder)
        tasks = {name: TASKS[name] for name in run.tasks}
        all_phases = phases(run.history, tasks)
        if len({phase.task for phase in all_phases}) < 2 or result.row.same_as:
            continue
        text = markdown(*phase_rows(all_phases[-_PHASES_SHOWN:], tasks))
        change = backward_transfer(all_phases)
        notes = (
            [f"The last {_PHASES_SHOWN} of {len(all_phases)} phases."]
            if len(all_phases) > _PHASES_SHOWN
            else []
        )
        if change is not None:
            notes.append(f"Mean change since each task's own last phase: {change:+.3f}.")
        parts.append(f"### {result.row.name}\n\n{text}\n\n{' '.join(notes)}")
    if not parts:
        return ""
    intro = "Dev scores after each phase, with the change since the end of the task's own phase (first seed)."
    return "\n\n".join(["## Forgetting: after every sequential phase", intro, *parts])


def _missing(found: Reproduction) -> str:
    lines = []
    for row in found.rows:
        if row.impossible:
            lines.append(f"- {escape(row.name)}: not reproducible: {escape(row.impossible)}")
        elif row.name in found.problems:
            lines.append(f"- {escape(row.name)}: failed: {escape(found.problems[row.name], 400)}")
        elif row.name not in found.results:
            lines.append(f"- {escape(row.name)}: not run yet")
    return "## Rows without a result, and failures\n\n" + "\n".join(lines) if lines else ""

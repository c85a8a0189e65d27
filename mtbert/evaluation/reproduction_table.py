"""The tables of published figures and ours: rows for a page, and all of it as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence

from mtbert.evaluation.markdown import escape
from mtbert.evaluation.metrics import COURSE_TRIO
from mtbert.evaluation.published import FORMULAS, PaperRow, Published
from mtbert.evaluation.reproduction import RowResult, Summary, judge
from mtbert.evaluation.table import Cell, markdown_table

COLUMNS = {"sst": "SST", "para": "para", "sts": "STS"}


def score_rows(done: Sequence[RowResult], published: Published) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows: published and our figures, the difference and its verdict; then mean and deviation a column."""
    headers = ["row", *(f"published {title}" for title in COLUMNS.values()), "published score", "formula"]
    headers += [
        *(f"our {title}" for title in COLUMNS.values()),
        "our score",
        "our 95% interval",
        "difference",
        "verdict",
    ]
    rows: list[list[Cell]] = []
    for result in done:
        row, score, verdict = result.row, result.score, judge(result, published)
        cells: list[Cell] = [row.name, *(row.figures.get(task) for task in COLUMNS)]
        cells += [published_score(row), row.formula]
        cells += [_plus_minus(result.summary(task)) for task in COLUMNS]
        cells += [_plus_minus(score), f"{score.low:.3f} to {score.high:.3f}" if score else None]
        cells += [f"{verdict.difference:+.3f}" if verdict else None, verdict.text if verdict else None]
        rows.append(cells)
    return headers, rows + _column_rows(done)


def published_score(row: PaperRow) -> str | None:
    """The published score, marked where it fits neither formula; a task's own figure where that is the score."""
    value = row.compared if row.score is None else row.score
    return None if value is None else f"{value:.3f}" + ("*" if row.matches_neither else "")


def _column_rows(done: Sequence[RowResult]) -> list[list[Cell]]:
    """Mean and deviation of every column, over the rows that have both a published figure and ours.

    Rows that one run serves are one entry, with the mean of their published figures.
    """
    columns = [
        _by_run([(r.row.run, r.row.figures.get(task), r.summary(task)) for r in done]) for task in COLUMNS
    ]
    joint = [r for r in done if r.row.formula in FORMULAS]
    columns.append(_by_run([(r.row.run, r.row.compared, r.score) for r in joint]))
    rows: list[list[Cell]] = []
    for name, function, least in (("mean", statistics.fmean, 1), ("deviation", statistics.stdev, 2)):
        cells = [
            [f"{function(values):.3f}" if len(values) >= least else None for values in side]
            for side in zip(*columns, strict=True)
        ]
        rows.append([f"{name} of the rows with both", *cells[0], None, *cells[1], None, None, None])
    return rows


def _by_run(
    entries: Sequence[tuple[str, float | None, Summary | None]],
) -> tuple[list[float], list[float]]:
    """Published figures and ours, one of each for every run, where there are both. entries: run, published, ours."""
    published: dict[str, list[float]] = {}
    ours: dict[str, float] = {}
    for run, figure, found in entries:
        if figure is not None and found is not None:
            published.setdefault(run, []).append(figure)
            ours[run] = found.mean
    return [statistics.fmean(figures) for figures in published.values()], list(ours.values())


def condition_rows(done: Sequence[RowResult], published: Published) -> tuple[list[str], list[list[Cell]]]:
    """Headers and rows: what was run, on what, for how long."""
    headers = [
        "row",
        "what",
        "encoder",
        "epochs",
        "seeds",
        "training rows",
        "minutes",
        "tokens per second",
        "notes",
    ]
    rows: list[list[Cell]] = []
    for result in done:
        row, seed = result.row, result.seeds[0]
        sizes = [f"{COLUMNS.get(t, t)} {n:,} of {published.train[t]:,}" for t, n in seed.train_rows.items()]
        notes = [row.note] if row.note else []
        if row.same_as:
            notes.append(f"the run of {row.same_as}")
        if row.hours:
            notes.append(f"published: {row.hours:g} hours")
        if row.where:
            notes.insert(0, row.where)
        speed = result.tokens_per_second
        rows.append(
            [
                row.name,
                row.title,
                seed.encoder,
                result.schedule.text(row.schedule),
                len(result.seeds),
                ", ".join(sizes),
                f"{result.minutes:.1f}",
                "features cached" if speed is None else f"{speed:,.0f}",
                "; ".join(notes),
            ]
        )
    return headers, rows


def _plus_minus(found: Summary | None) -> str | None:
    if found is None:
        return None
    return f"{found.mean:.3f}" + ("" if found.deviation is None else f" ± {found.deviation:.3f}")


def markdown(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A Markdown table of cells that may hold foreign text."""
    safe = [[escape(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    return markdown_table([escape(header) for header in headers], safe)


def csv_text(
    rows: Sequence[PaperRow],
    results: Mapping[str, RowResult],
    problems: Mapping[str, str],
    published: Published,
) -> str:
    """One line a row of the papers, empty cells where nothing is known."""
    tasks = (*COURSE_TRIO, "cfimdb")
    headers = ["row", "paper", "title", "where", "formula", "fits_neither_formula"]
    headers += [*(f"published_{task}" for task in tasks), "published_score", "published_hours"]
    headers += [
        "encoder",
        "epochs",
        "paper_epochs",
        "epochs_in_words",
        "seeds",
        *(f"rows_{task}" for task in tasks),
    ]
    for key in (*tasks, "score"):
        headers += [key, f"{key}_deviation"]
    headers += [
        "low",
        "high",
        "difference",
        "half_width",
        "verdict",
        "minutes",
        "tokens_per_second",
        "note",
        "problem",
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, headers, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line: dict[str, object] = {
            "row": row.name,
            "paper": published.titles[row.paper],
            "title": row.title,
            "where": row.where,
            "formula": row.formula,
            "fits_neither_formula": int(row.matches_neither),
            **{f"published_{task}": row.figures.get(task) for task in tasks},
            "published_score": row.score,
            "published_hours": row.hours,
            "note": row.note,
            "problem": row.impossible or problems.get(row.name),
        }
        if row.name in results:
            line |= _csv_result(results[row.name], published)
        writer.writerow({key: "" if value is None else value for key, value in line.items()})
    return text.getvalue()


def _csv_result(result: RowResult, published: Published) -> dict[str, object]:
    first, score, verdict = result.seeds[0], result.score, judge(result, published)
    line: dict[str, object] = {
        "encoder": first.encoder,
        "epochs": result.schedule.epochs,
        "paper_epochs": result.row.schedule.epochs,
        "epochs_in_words": result.schedule.text(result.row.schedule),
        "seeds": len(result.seeds),
        "minutes": round(result.minutes, 2),
        "tokens_per_second": None if result.tokens_per_second is None else round(result.tokens_per_second),
    }
    for task, count in first.train_rows.items():
        line[f"rows_{task}"] = count
    for key in (*first.train_rows, "score"):
        summary = score if key == "score" else result.summary(key)
        if summary is not None:
            line |= {key: _digits(summary.mean), f"{key}_deviation": _digits(summary.deviation)}
    if score is not None:
        line |= {"low": _digits(score.low), "high": _digits(score.high)}
    if verdict is not None:
        line |= {
            "difference": _digits(verdict.difference),
            "half_width": _digits(verdict.half_width),
            "verdict": verdict.text,
        }
    return line


def _digits(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

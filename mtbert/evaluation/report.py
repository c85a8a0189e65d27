"""report.md: everything worth knowing of one run on one page, written from its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtbert.evaluation.assessment import ordinal_text
from mtbert.evaluation.bootstrap import RESAMPLES
from mtbert.evaluation.calibration import BINS, CalibrationReport, calibration_report, calibration_rows
from mtbert.evaluation.evaluation_table import evaluation_rows
from mtbert.evaluation.files import write_text
from mtbert.evaluation.halves import SELECTION_HALF, WHOLE
from mtbert.evaluation.history import History, epoch_text
from mtbert.evaluation.markdown import escape, fenced, image_links
from mtbert.evaluation.method_sections import method_sections
from mtbert.evaluation.metrics import TaskScores, class_names
from mtbert.evaluation.plots import write_plots
from mtbert.evaluation.plots.curves import loss_unit
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.profile import profile_section
from mtbert.evaluation.results import Results, class_table_rows, result_rows, results
from mtbert.evaluation.run import Run, check_tasks, read_run, run_baselines
from mtbert.evaluation.swaps import SwapConsistency, read_swaps
from mtbert.evaluation.table import Cell, markdown_table
from mtbert.evaluation.worst import worst_errors

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

Examples = Mapping[str, tuple[Sequence[str], Sequence[tuple[str, ...]], "np.ndarray | None"]]

PROBLEMS_FILE = "problems.txt"
PROBLEMS_SHOWN = 10
TEXT_LIMIT = 240


def write_report(
    folder: Path,
    tasks: Mapping[str, Task],
    examples: Examples | None = None,
    *,
    worst: int = 8,
    resamples: int = RESAMPLES,
) -> Path:
    """Write report.md and plots/*.png into a run's folder and return the report's path.

    `tasks` maps names to tasks and holds at least the run's own. `examples` gives the dev sentences by task
    as (ids, texts, labels): with them the report shows the `worst` errors of each task. What the folder
    does not hold is left out. `resamples` are those of the bootstrap intervals.
    """
    run = read_run(folder)
    check_tasks(run, tasks)
    chosen = {name: tasks[name] for name in run.tasks}
    predictions = run.all_predictions(chosen)
    outcome = run_results(run, chosen, predictions, resamples)
    calibrations = {
        name: found
        for name, task in outcome.tasks.items()
        if (found := calibration_report(task, predictions[name], halved=run.halved)) is not None
    }
    plots = write_plots(run, chosen, predictions, outcome, calibrations)
    swaps = read_swaps(folder)
    sections = [
        _header(run),
        _results(run, outcome, resamples),
        _evaluations(run, chosen),
        image_links(plots, folder, ("metrics", "losses")),
        *method_sections(run.history, chosen, plots, folder, dev=SELECTION_HALF if run.halved else WHOLE),
        *(
            _task(
                task,
                outcome,
                predictions,
                plots,
                folder,
                examples,
                worst,
                calibrations.get(task.name),
                swaps.get(task.name),
            )
            for task in outcome.tasks.values()
        ),
        _data(run, chosen, plots, folder),
        _training(run, plots, folder),
        "" if run.profile is None else profile_section(run.profile, plots, folder),
        "## Configuration\n\n" + fenced(run.config_text, "yaml") if run.config_text else "",
    ]
    return write_text(folder / "report.md", "\n\n".join(filter(None, sections)) + "\n")


def run_results(
    run: Run, tasks: Mapping[str, Task], predictions: Mapping[str, Predictions], resamples: int = RESAMPLES
) -> Results:
    """The dev results of a run; train scores are those of its best evaluation."""
    best = run.history.best_evaluation() or {}
    train = {name: TaskScores.from_json(values) for name, values in (best.get("train") or {}).items()}
    base = run_baselines(run, tasks)
    return results(tasks, predictions, baselines=base, train=train, resamples=resamples, halved=run.halved)


def _header(run: Run) -> str:
    info = run.info
    facts = [
        ("commit", run.git),
        ("date", info.get("created")),
        ("encoder", info.get("encoder")),
        ("tasks", ", ".join(run.tasks)),
        ("device", info.get("device")),
        ("threads", info.get("threads")),
        ("ranks", info.get("ranks") if info.get("ranks") != 1 else None),
        ("precision", info.get("precision")),
        ("gradient checkpointing", run.checkpointing),
        ("parameters", _parameters(info.get("parameters"))),
        ("frozen layers", run.frozen_layers),
        (
            "versions",
            ", ".join(f"{name} {version}" for name, version in (info.get("versions") or {}).items()),
        ),
    ]
    lines = [f"- {name}: {escape(str(value))}" for name, value in facts if value not in (None, "")]
    notes = []
    if info.get("synthetic"):
        notes.append(
            "> **Synthetic data.** The examples were generated by the program. The scores below show that "
            "training works; they say nothing about real text."
        )
    if info.get("contamination"):
        notes.append(f"> **Contamination.** {escape(str(info['contamination']))}")
    return "\n\n".join([f"# Run {escape(run.name)}", "\n".join(lines), *notes])


def _parameters(counts: Mapping[str, int] | None) -> str | None:
    if not counts:
        return None
    trainable, total = counts.get("trainable", 0), counts.get("total", 0)
    share = f" ({trainable / total:.1%})" if total else ""
    return f"{trainable:,} trainable of {total:,}{share}"


def _results(run: Run, outcome: Results, resamples: int) -> str:
    if not outcome.scores:
        return "## Results\n\nThe folder holds no labelled predictions yet."
    notes = [
        f"Dev scores come from `predictions/*-dev.jsonl`; intervals from {resamples:,} bootstrap resamples "
        "of the dev examples.",
        "`chance` guesses at random; `majority` always answers the training table's commonest class "
        "(for similarity its mean score).",
    ]
    if outcome.whole:
        notes.append(
            "The half of each dev set that chose the checkpoint took no part in the scores and their intervals. "
            "`all of dev` counts it, and is optimistic."
        )
    best = run.history.best_evaluation()
    if best is not None:
        epoch = f", epoch {epoch_text(best['epoch'])}" if "epoch" in best else ""
        sample = f"; `train` is of that moment, {_train_sample(run, outcome)}" if outcome.train else ""
        notes.append(f"The best evaluation was at step {best['step']:,}{epoch}{sample}.")
    if outcome.overall is not None:
        notes.append(
            "`overall` = (SST + paraphrase + (STS + 1) / 2) / 3, `mean` = (SST + paraphrase + STS) / 3."
        )
    return f"## Results\n\n{markdown_table(*result_rows(outcome))}\n\n" + "\n".join(notes)


def _train_sample(run: Run, outcome: Results) -> str:
    """On how many of the training examples the train scores rest."""
    parts, whole = [], True
    for name, scores in outcome.train.items():
        rows = run.data(name, "train").get("rows")
        whole = whole and scores.examples == rows
        parts.append(f"{escape(name)} {scores.examples:,}" + (f" of {rows:,}" if rows else ""))
    if whole:
        return "on all training examples"
    return f"on a seeded sample of the training examples ({', '.join(parts)})"


def _evaluations(run: Run, tasks: Mapping[str, Task]) -> str:
    if not run.history.evaluations:
        return ""
    headers, rows = evaluation_rows(run.history, tasks)
    units = sorted({loss_unit(task) for task in tasks.values()})
    note = f"Scores are train / dev; `overall` and `mean` are of dev. Losses: {', '.join(units)}."
    if run.halved:
        note = f"Here dev is the {SELECTION_HALF}, which chooses the checkpoint. {note}"
    return f"## After every evaluation\n\n{markdown_table(list(map(escape, headers)), rows)}\n\n{note}"


def _task(
    task: Task,
    outcome: Results,
    predictions: Mapping[str, Predictions],
    plots: Mapping[str, Path],
    folder: Path,
    examples: Examples | None,
    worst: int,
    calibration: CalibrationReport | None,
    swaps: SwapConsistency | None,
) -> str:
    scores = outcome.scores[task.name]
    parts = [f"## {escape(task.title)}"]
    if task.kind == "similarity":
        headers = ["Pearson", "Spearman", "mean squared error", "examples"]
        rows: list[list[Cell]] = [[scores.pearson, scores.spearman, scores.mse, scores.examples]]
        parts.append(markdown_table(headers, rows))
    else:
        headers, rows = class_table_rows(scores)
        rows = [[escape(str(row[0])), *row[1:]] for row in rows]
        parts.append(f"Accuracy {scores.accuracy:.3f}, macro F1 {scores.macro_f1:.3f}.")
        parts.append(markdown_table(headers, rows))
        parts.append(ordinal_text(outcome, task))
    if swaps is not None:
        parts.append(swaps.to_text())
    parts.append(image_links(plots, folder, (f"confusion-{task.name}", f"similarity-{task.name}")))
    if calibration is not None:
        parts.append(_calibration(task, calibration, plots, folder))
    if examples is not None and task.name in examples:
        parts.append(_worst(task, predictions[task.name], examples[task.name], worst))
    return "\n\n".join(filter(None, parts))


def _calibration(task: Task, report: CalibrationReport, plots: Mapping[str, Path], folder: Path) -> str:
    note = (
        f"Calibration error: the mean gap between confidence and accuracy in {BINS} bins of confidence. All three are"
        " better when lower. The temperature divides all logits; no prediction changes."
    )
    rows = markdown_table(*calibration_rows(report))
    return "\n\n".join(
        filter(
            None, ["### Calibration", rows, note, image_links(plots, folder, (f"reliability-{task.name}",))]
        )
    )


def _worst(
    task: Task,
    predictions: Predictions,
    examples: tuple[Sequence[str], Sequence[tuple[str, ...]], np.ndarray | None],
    count: int,
) -> str:
    ids, texts = examples[0], examples[1]
    # Ids may repeat: the place in the table says which example is meant, as long as the order is the same.
    same_order = list(ids) == list(predictions.ids)
    times = Counter(ids)
    by_id = {name: sentences for name, sentences in zip(ids, texts, strict=True) if times[name] == 1}
    mistakes = worst_errors(task, predictions, count)
    if not mistakes:
        return ""
    names = class_names(task)
    similarity = task.kind == "similarity"
    rows: list[list[Cell]] = []
    for mistake in mistakes:
        found = texts[mistake.index] if same_order else by_id.get(mistake.id, ("(not given)",))
        sentences = " <br> ".join(escape(text, TEXT_LIMIT) for text in found)
        if similarity:
            answers = [f"{mistake.label:.2f}", f"{mistake.prediction:.2f}", f"{mistake.badness:.2f}"]
        else:
            answers = [escape(names[int(mistake.label)]), escape(names[int(mistake.prediction)])]
            answers.append(f"{mistake.badness:.3f}")
        rows.append([sentences, *answers, escape(mistake.id)])
    headers = ["text", "label", "prediction", "absolute error" if similarity else "its probability", "id"]
    return f"### Worst errors\n\n{markdown_table(headers, rows)}"


def _data(run: Run, tasks: Mapping[str, Task], plots: Mapping[str, Path], folder: Path) -> str:
    rows: list[list[Cell]] = []
    problems: list[str] = []
    unlisted = 0
    for name, splits in (run.info.get("data") or {}).items():
        title = tasks[name].title if name in tasks else name
        for split, facts in splits.items():
            skipped = facts.get("problems") or []
            rows.append(
                [
                    escape(title),
                    split,
                    escape(str(facts.get("file") or "")),
                    facts.get("rows"),
                    facts.get("problem_count", len(skipped)),
                    facts.get("truncated"),
                    _count(facts.get("overlap")),
                ]
            )
            for extra in facts.get("extra") or []:
                file = escape(str(extra.get("file") or ""))
                rows.append(
                    [escape(title), f"of {split}: extra", file, extra["rows"], extra["left_out"], None, None]
                )
            problems += [_problem(problem) for problem in skipped]
            unlisted += facts.get("problem_count", len(skipped)) - len(skipped)
    if not rows:
        return ""
    headers = ["task", "split", "file", "rows", "unusable rows", "truncated", "also in train"]
    parts = ["## Data", markdown_table(headers, rows)]
    if problems:
        listing = (folder / PROBLEMS_FILE).is_file()
        shown = [f"- {escape(problem, TEXT_LIMIT)}" for problem in problems[:PROBLEMS_SHOWN]]
        more = unlisted + len(problems) - len(shown)
        if more:
            shown.append(f"- and {more:,} more" + ("" if listing else f" (run.json lists {len(problems):,})"))
        where = f" (all of them are in [{PROBLEMS_FILE}]({PROBLEMS_FILE}))" if listing else ""
        parts.append(f"Rows that could not be used{where}:\n\n" + "\n".join(shown))
    return "\n\n".join(filter(None, [*parts, image_links(plots, folder, ("labels",))]))


def _count(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, tuple)) else value


def _problem(problem: Any) -> str:
    """One row problem as text: run.json holds objects with path, line and reason, or plain sentences."""
    if isinstance(problem, Mapping):
        return f"{problem.get('path', '')}: line {problem.get('line', '?')}: {problem.get('reason', '')}"
    return str(problem)


def _training(run: Run, plots: Mapping[str, Path], folder: Path) -> str:
    times = run.history.epoch_times()
    parts = ["## Training"]
    kind, meaning = "useful tokens", "real tokens of training steps, no padding"
    if run.features_cached:
        kind = "examples' tokens"
        meaning = (
            "features cached: the frozen encoder read every table once, training steps read its features"
        )
    if times:
        seconds, tokens = sum(time.seconds for time in times), sum(time.tokens for time in times)
        if seconds > 0:
            rate = f"{tokens:,} {kind} in {seconds:,.0f} seconds: {tokens / seconds:,.0f} a second"
            parts.append(f"{rate} ({meaning}; evaluation not counted).")
        headers = ["epoch", "step", "seconds", kind, "tokens per second"]
        rows: list[list[Cell]] = [
            [
                epoch_text(time.epoch),
                time.step,
                round(time.seconds, 1),
                time.tokens,
                round(time.tokens_per_second),
            ]
            for time in times
        ]
        parts.append(markdown_table(headers, rows, digits=1))
    parts += [_loss_scale(run.history), _compiled(run.history)]
    parts.append(image_links(plots, folder, ("speed", "optimiser")))
    return "\n\n".join(filter(None, parts)) if len(list(filter(None, parts))) > 1 else ""


def _loss_scale(history: History) -> str:
    """What fp16's loss scale did; empty for other precisions."""
    scales = history.column("loss_scale")[1]
    if not scales:
        return ""
    skipped = history.skipped_steps()
    steps = (
        "1 step was skipped because its" if skipped == 1 else f"{skipped:,} steps were skipped because their"
    )
    return f"fp16: {steps} scaled gradients overflowed; the loss scale ended at {scales[-1]:g}."


def _compiled(history: History) -> str:
    """How often torch.compile compiled what, and what it could not; empty for a run without."""
    found = (history.epochs[-1].get("compiled") or {}) if history.epochs else {}
    graphs, failed = found.get("graphs") or {}, found.get("uncompiled") or {}
    lines = []
    if graphs:
        counts = ", ".join(f"{escape(name)} {count}" for name, count in graphs.items())
        lines.append(f"torch.compile, graphs of each part since the last start: {counts}.")
    lines += [
        f"Not compiled: {escape(name)}, because {escape(str(reason))}." for name, reason in failed.items()
    ]
    return " ".join(lines)

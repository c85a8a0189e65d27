"""The files of an augmentation, and its summary in words."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mtbert.augmentation.job import Job, Made, Prepared, labels_of
from mtbert.augmentation.output import SOURCE
from mtbert.augmentation.prompt import TEMPLATE
from mtbert.augmentation.validation import CONFIDENT
from mtbert.data.held_out import NEAR
from mtbert.data.tables import Table, table_text
from mtbert.engine.environment import code_version
from mtbert.errors import UserError
from mtbert.evaluation.baselines import label_histogram
from mtbert.evaluation.files import write_text
from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.plots.augmentation import added_labels
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.table import Cell, table

_PACKAGES = ("mtbert", "openai", "py3langid", "numpy")


def record_path(output: Path) -> Path:
    """The record beside a table."""
    return output.with_suffix(".json")


def plot_path(output: Path) -> Path:
    """The plot beside a table."""
    return output.with_name(f"{output.stem}-labels.png")


def write_files(job: Job, prepared: Prepared, made: Made) -> list[Path]:
    """Write the table, then its record and, where rows were added, the plot of the labels; each whole or not at all."""
    text = table_text(made.table, job.task.layout, {SOURCE: made.sources})
    record = describe(job, prepared, made, hashlib.sha256(text.encode()).hexdigest())
    write_text(job.output, text)
    written = [
        job.output,
        write_text(record_path(job.output), json.dumps(record, indent=2, ensure_ascii=False) + "\n"),
    ]
    if job.goal.kind != "clean":
        own = label_histogram(job.task, labels_of(prepared.train)) or {}
        new = label_histogram(job.task, labels_of(made.table)) or {}
        figure = added_labels(job.task, own, new, Source(job.output.stem, code_version()))
        written.append(save(figure, plot_path(job.output)))
    return written


def describe(job: Job, prepared: Prepared, made: Made, digest: str) -> dict[str, Any]:
    """The record: how the table was made, from what, and what was not used. No path of the machine, and no key."""
    counts = _counts(job, prepared, made)
    outcome = made.outcome
    record: dict[str, Any] = {
        "made_by": "python -m mtbert.augment",
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "git": code_version(),
        "versions": {"python": platform.python_version(), **dict(_versions())},
        "task": job.task.name,
        "goal": asdict(job.goal),
        "seed": job.seed,
        "attempts": job.attempts,
        "tables": {split: _table(each, job) for split, each in prepared.splits.items()},
        "table": {"file": job.output.name, "sha256": digest, "rows": len(made.table)},
        "rows": {
            "wanted": len(prepared.slots),
            "made": len(outcome.rows),
            "missing": dict(Counter(outcome.missing.values()).most_common()),
            "not_rewritten_because_in_dev_or_test": len(prepared.train) - len(prepared.usable),
        },
        "answers_not_used": dict(outcome.rejected.most_common()),
        "labels": counts,
        "validation": {
            **{name: value for name, value in asdict(job.length_bounds).items()},
            "same_words_as_dev_or_test_below": NEAR,
            "language_confidence": CONFIDENT if job.offline is None else None,
        },
    }
    if job.goal.kind == "clean":
        record["rows"]["changed"] = made.repaired
    if job.offline is not None:
        return record | {"method": "offline", "augmenters": list(job.offline)}
    assert made.traffic is not None
    traffic = asdict(made.traffic) | {"models": sorted(Path(name).name for name in made.traffic.models)}
    return record | {
        "method": "language model",
        # A local server may call its model by the folder that it lies in.
        "model": Path(made.model or "").name
        if (made.model or "").startswith(("/", "~", "."))
        else made.model,
        "sampling": asdict(job.sampling),
        "prompt": {"template": TEMPLATE, **asdict(job.prompt)},
        "structured_output": made.structured,
        "streamed": job.server.stream,
        "requests": traffic,
    }


def summary(job: Job, prepared: Prepared, made: Made, written: Iterable[Path]) -> str:
    """What a user wants to know at the end."""
    outcome, wanted = made.outcome, len(prepared.slots)
    lines = []
    if job.goal.kind == "clean":
        lines.append(
            f"{job.task.name}: {len(made.table):,} rows, {wanted:,} of them looked at: {made.repaired:,} repaired,"
            f" {len(outcome.rows) - made.repaired:,} found without damage, {wanted - len(outcome.rows):,} kept as they"
            " were for want of a usable repair"
        )
    else:
        lines.append(f"{job.task.name}: {len(outcome.rows):,} of {wanted:,} rows made")
        lines.append("")
        lines.append(_label_table(job, prepared, made))
        lines.append("")
    skipped = len(prepared.train) - len(prepared.usable)
    if skipped:
        lines.append(
            f"{skipped:,} training rows have a sentence that also stands in dev or test: neither rewritten nor shown"
        )
    if made.traffic is not None:
        t = made.traffic
        tokens = f"; {t.prompt_tokens:,} tokens read, {t.answer_tokens:,} written" if t.answer_tokens else ""
        lines.append(
            f"answers: {t.asked:,} asked for, {t.from_cache:,} from {job.cache_path}, {t.retries:,} sent again{tokens}"
        )
    lines.append(f"answers not used: {_reasons(outcome.rejected)}")
    lines += [f"  {reason}: {detail}" for reason, detail in made.details.items()]
    if outcome.missing and job.goal.kind != "clean":
        lines.append(
            f"{len(outcome.missing):,} rows are missing after {job.attempts} attempts each; the last reason:"
            f" {_reasons(Counter(outcome.missing.values()))}"
        )
    return "\n".join([*lines, "", *(f"written: {path}" for path in written)])


def _reasons(counts: Counter[str]) -> str:
    total = counts.total()
    if not total:
        return "none"
    return f"{total:,} ({', '.join(f'{count:,} {reason}' for reason, count in counts.most_common())})"


def _label_table(job: Job, prepared: Prepared, made: Made) -> str:
    counts = _counts(job, prepared, made)
    rows: list[list[Cell]] = [
        [name, before, added, before + added]
        for name, before, added in zip(counts["names"], counts["before"], counts["added"], strict=True)
    ]
    total = [sum(counts["before"]), sum(counts["added"])]
    return table(["label", "before", "added", "after"], [*rows, ["all", *total, sum(total)]])


def _counts(job: Job, prepared: Prepared, made: Made) -> dict[str, Any]:
    own = label_histogram(job.task, labels_of(prepared.train)) or {}
    if job.task.score_range is None:
        names = [f"{number} {name}" for number, name in enumerate(class_names(job.task))]
    else:
        names = [f"{low:g} to {high:g}" for low, high in zip(own["edges"], own["edges"][1:], strict=False)]
    if job.goal.kind == "clean":
        return {"names": names, "before": own["counts"], "added": [0] * len(names)}
    new = label_histogram(job.task, labels_of(made.table)) or {}
    return {"names": names, "before": own["counts"], "added": new["counts"]}


def _table(each: Table, job: Job) -> dict[str, Any]:
    """A table that was read: its name, its rows, and the sha256 of its file (of generated ones: of their text)."""
    try:
        data = each.path.read_bytes() if each.path.is_file() else table_text(each, job.task.layout).encode()
    except OSError as error:
        raise UserError(f"{each.path}: cannot be read: {error.strerror or error}") from error
    return {"file": each.path.name, "sha256": hashlib.sha256(data).hexdigest(), "rows": len(each)}


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue

"""README.md of an exported model: what it was made of, how good it is, what to be careful of, how to use it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import mtbert
from mtbert.config import to_dict
from mtbert.engine.pretraining import STAGES_FOLDER
from mtbert.errors import DataError, UserError
from mtbert.evaluation.markdown import escape, fenced
from mtbert.evaluation.metrics import headline_name
from mtbert.evaluation.report import run_results
from mtbert.evaluation.results import Results, result_rows
from mtbert.evaluation.run import Run, read_run
from mtbert.evaluation.table import markdown_table
from mtbert.exporting.run import MINILM_HUB_ID, ExportedRun
from mtbert.exporting.snippets import snippet
from mtbert.outside_files import own_file, read_text

_MOST_CARD_BYTES = 1 << 20
_LIBRARIES = {
    "hf": "transformers",
    "peft": "peft",
    "sentence-transformers": "sentence-transformers",
    "onnx": "onnx",
}
_PATHS = ("data", "extra_data", "output", "cache", "plugins", "device", "threads")
"""Fields that are of the machine, nobody else's affair."""


def write_card(exported: ExportedRun, folder: Path, format_name: str, name: str) -> None:
    """Write README.md into `folder`, which will be called `name`."""
    run = read_run(exported.loaded.run.path)
    results = _results(exported, run)
    metadata = _metadata(exported, format_name, run, results, name)
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{header}---",
        f"# {escape(name)}",
        _introduction(exported, run, format_name),
        "## Use\n\n" + _use(exported, folder, format_name, name),
        "## Data\n\n" + _data(exported, run),
        "## Results\n\n" + _metrics(run, results),
        "## Limits\n\n" + _limits(exported, run, format_name),
        "## Training\n\n" + _training(exported, run),
        "## Licence\n\n" + _licence_text(exported),
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _results(exported: ExportedRun, run: Run) -> Results | None:
    """Scores of the run's own predictions of dev; None where it has none."""
    tasks = exported.loaded.tasks
    if not any(run.has_predictions(name) for name in run.tasks if name in tasks):
        return None
    found = {name: run.predictions(task) for name, task in tasks.items() if run.has_predictions(name)}
    return run_results(run, tasks, found, exported.config.evaluation.resamples)


def _metadata(
    exported: ExportedRun, format_name: str, run: Run, results: Results | None, name: str
) -> dict[str, Any]:
    """The hub's metadata: https://huggingface.co/docs/hub/model-cards."""
    base = exported.base_model
    tags = ["mtbert", "multi-task", *([exported.name] if exported.name else exported.loaded.tasks)]
    values: dict[str, Any] = {
        "license": licence(exported),
        "library_name": _LIBRARIES[format_name],
        "pipeline_tag": _pipeline(exported, format_name),
        "tags": tags,
    }
    if base is not None:
        values["base_model"] = base
        values["base_model_relation"] = "adapter" if format_name == "peft" else "finetune"
    if results is not None:
        scored = [task for task in results.tasks if exported.name in (None, task)]
        values["model-index"] = [{"name": name, "results": [_entry(results, run, task) for task in scored]}]
    return values


def _pipeline(exported: ExportedRun, format_name: str) -> str:
    if exported.name is None or format_name == "peft":
        return "feature-extraction"
    if format_name == "sentence-transformers":
        return "text-ranking" if not exported.head.features else "sentence-similarity"
    return "text-classification"


def _entry(results: Results, run: Run, name: str) -> dict[str, Any]:
    task = results.tasks[name]
    interval = results.intervals[name]
    metric = "pearson" if task.kind == "similarity" else "accuracy"
    kind = "sentence-similarity" if task.kind == "similarity" else "text-classification"
    return {
        "task": {"type": kind, "name": task.title},
        "dataset": {"type": name, "name": _table_name(run, name, "dev"), "split": results.split},
        "metrics": [
            {
                "type": metric,
                "name": f"{headline_name(task)} (95% interval {interval.low:.3f} to {interval.high:.3f})",
                "value": round(float(results.scores[name].headline), 4),
            }
        ],
    }


def licence(exported: ExportedRun) -> str:
    """The licence of what the weights began from, as its own card has it; `unknown` where nothing says it."""
    if exported.base_model == MINILM_HUB_ID:
        return "apache-2.0"
    folder = Path(exported.config.model.pretrained).expanduser()
    try:
        text = read_text(own_file(folder, "README.md", UserError), UserError, _MOST_CARD_BYTES)
        header = text.split("---")[1] if text.startswith("---") else ""
        found = yaml.safe_load(header)
    except (UserError, yaml.YAMLError, ValueError, TypeError, RecursionError):
        return "unknown"
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) and len(named) < 60 else "unknown"


def _licence_text(exported: ExportedRun) -> str:
    found = licence(exported)
    if found == "unknown":
        return (
            "Unknown: nothing says the licence of the weights that training began from. Find it out before passing the"
            " model on. The tables that it was trained on have licences of their own."
        )
    tables = "The tables that it was trained on have licences of their own."
    return f"{escape(found)}, that of the weights that training began from. {tables}"


def _introduction(exported: ExportedRun, run: Run, format_name: str) -> str:
    config = exported.config
    titles = ", ".join(escape(task.title) for task in exported.loaded.tasks.values())
    base = exported.base_model
    began = f"[{base}](https://huggingface.co/{base})" if base else "a model of a local folder"
    what = (
        "the adapters of"
        if format_name == "peft"
        else "the encoder with the head of"
        if exported.name
        else "the encoder of"
    )
    what += f" the task {escape(exported.task.title)}" if exported.name else " all tasks"
    return (
        f"A BERT encoder ({exported.encoder.config.num_hidden_layers} layers of width"
        f" {exported.encoder.config.hidden_size}) that mtbert {mtbert.__version__} trained on {titles}"
        f" (mode {config.mode}), beginning from {began}. This folder holds {what}: step {exported.loaded.step}, the"
        f" best checkpoint of run {escape(run.name)}."
    )


def _use(exported: ExportedRun, folder: Path, format_name: str, name: str) -> str:
    code, words = snippet(exported, folder, format_name, name)
    return f"```python\n{code}```\n\n{words}"


def _table_name(run: Run, task: str, split: str) -> str:
    file = run.data(task, split).get("file")
    return Path(str(file)).name if file else "unknown"


def _data(exported: ExportedRun, run: Run) -> str:
    headers = ["task", "split", "table", "rows", "sha256"]
    rows = [row for name in exported.loaded.tasks for row in _table_rows(run, name, name)]
    for path in sorted((run.folder / STAGES_FOLDER).glob("*/run.json")):
        place = f"{STAGES_FOLDER}/{path.parent.name}/run.json"
        stage = read_run(own_file(run.folder, place, DataError).parent)
        names = [str(name) for name in stage.info.get("data") or {}]
        rows += [
            row for name in names for row in _table_rows(stage, name, f"{escape(name)} (before the run)")
        ]
    notes = [
        markdown_table(headers, rows),
        "sha256: of the file; where the table is no file, of its rows as JSON.",
    ]
    if exported.config.pretraining.mlm_epochs:
        notes.append("Before the run, masked-language modelling read the sentences of the training tables.")
    if run.info.get("synthetic"):
        notes.append("The examples are synthetic: the program generated them.")
    overlap = {name: run.data(name, "dev").get("overlap") for name in exported.loaded.tasks}
    found = ", ".join(f"{number} of {name}" for name, number in overlap.items() if number)
    if found:
        notes.append(f"Dev examples that also stand in train: {found}.")
    return "\n\n".join(notes)


def _table_rows(run: Run, task: str, label: str) -> list[list[Any]]:
    """A row for each table of a task, and for each that joined it."""
    rows: list[list[Any]] = []
    for split in ("train", "dev", "test"):
        facts = run.data(task, split)
        if not facts:
            continue
        digest = escape(str(facts.get("sha256") or "not recorded"))
        more = facts.get("extra") or []
        own = facts["rows"] - sum(extra["rows"] for extra in more) if more else facts.get("rows")
        rows.append([label, split, escape(_table_name(run, task, split)), own, digest])
        for extra in more:
            name = escape(Path(extra["file"]).name)
            rows.append([label, f"{split}: extra", name, extra["rows"], escape(extra["sha256"])])
    return rows


def _metrics(run: Run, results: Results | None) -> str:
    if results is None:
        return "The run has no predictions of a dev table."
    chosen = (
        "One half of dev chose the checkpoint; the scores are of the other."
        if run.halved
        else "Dev also chose the checkpoint, so that its scores are a little optimistic."
    )
    return f"{markdown_table(*result_rows(results))}\n\n{chosen} Intervals: 95%, bootstrap over examples."


def _limits(exported: ExportedRun, run: Run, format_name: str) -> str:
    config = exported.config
    limits = []
    if run.info.get("contamination"):
        limits.append(escape(str(run.info["contamination"])))
    if run.info.get("synthetic"):
        limits.append(
            "Trained on synthetic sentences: it says that the program works, nothing about real text."
        )
    limits.append(f"Texts beyond {exported.max_length} tokens (with [CLS] and [SEP]) are cut.")
    cut = {
        name: config.task[name].truncate
        for name in ([exported.name] if exported.name else exported.loaded.tasks)
    }
    for name, end in cut.items():
        if end != "head":
            limits.append(f"{name}: training kept the {end} of longer texts; this tokeniser keeps the head.")
    if format_name == "peft":
        limits.append(
            "PEFT carries the adapters alone; the heads are in heads.safetensors, which mtbert reads. In training,"
            " query, key and value shared one dropout mask on their adapters' input; PEFT draws one for each."
        )
    if format_name == "hf" and exported.name is not None and config.task[exported.name].head.pooling == "cls":
        limits.append(
            "`bert.pooler` belongs to the head here, it is not BERT's own; the encoder with its own is exported"
            " without a task."
        )
    limits.append(
        "The model has the languages and the biases of its tables and of its base; nothing else was measured."
    )
    return "\n".join(f"- {limit}" for limit in limits)


def _training(exported: ExportedRun, run: Run) -> str:
    values = to_dict(exported.config)
    for name in _PATHS:
        values.pop(name, None)
    values["model"]["pretrained"] = exported.base_model or "a local folder"
    values["model"].pop("adapter", None)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    versions = ", ".join(f"{k} {v}" for k, v in _mapping(run.info.get("versions")).items())
    facts = [
        f"- commit: {escape(run.git)}",
        f"- date: {escape(str(run.info.get('created')))}",
        f"- device: {escape(str(run.info.get('device')))}, precision {escape(str(run.info.get('precision')))}",
        f"- versions: {escape(versions)}",
        f"- sha256 of the encoder's weights: {_digest(exported)}",
    ]
    listed = "\n".join(facts)
    return f"{listed}\n\n<details><summary>configuration</summary>\n\n{fenced(text, 'yaml')}\n\n</details>"


def _digest(exported: ExportedRun) -> str:
    """Of the trained encoder with its adapters apart: names and float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    state = exported.encoder.state_dict()
    for name in sorted(state):
        digest.update(json.dumps([name, list(state[name].shape)]).encode())
        digest.update(state[name].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}

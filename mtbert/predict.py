"""`python -m mtbert.predict RUN`: prediction files for a run's tables, or answers for sentences of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtbert.cli import add_trust, config_from_file, run_main
from mtbert.data.tables import Table, read_table
from mtbert.engine.build import prepare_data, task_data
from mtbert.engine.finish import predict_all, predict_split
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.precision import product_settings
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.metrics import class_names
from mtbert.evaluation.predictions import predictions_from_outputs, probabilities
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import Task


def main(arguments: list[str]) -> None:
    """Write prediction files, or print an answer for every given sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.predict",
        description="Without --task: write the prediction files (the course's format and JSON lines) of the run's"
        " dev and test tables. With --task: predict given sentences.",
        epilog="--debug shows the traceback of an error.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("text", nargs="*", help="sentences; for a pair task two of them make an example")
    parser.add_argument("--task", help="the task to predict for the sentences")
    parser.add_argument(
        "--file",
        type=Path,
        help="a .txt file (a sentence a line, pairs separated by a tab) or a table with the task's columns",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--data", help="tables to predict (default: the run's own)")
    parser.add_argument("--output", type=Path, help="write into OUTPUT/predictions (default: RUN)")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_trust(parser)
    options = parser.parse_intermixed_args(arguments)  # sentences may follow --task
    if options.task is None and (options.text or options.file):
        raise ConfigError("--task: name the task that the sentences are for")
    if options.task is not None and (options.data or options.output):
        raise ConfigError("--data and --output are for whole tables; with --task give sentences or --file")
    with logging_to(None):
        run = RunFolder.open(options.run)
        config = config_from_file(run.config_path, trust_plugins=options.trust_plugins)
        if options.data is not None:
            if options.output is None:
                raise ConfigError(
                    f"--output: name a folder; {run.path} keeps the predictions of its own tables"
                )
            config = dataclasses.replace(config, data=options.data)
        if options.task is not None and options.task not in config.tasks:
            raise ConfigError(
                f"--task: {run.path} was trained on {', '.join(config.tasks)}, not on {options.task}"
            )
        loaded = load_run(run, config, device=options.device)
        with memory_errors(config.max_tokens), product_settings(loaded.config.precision):
            if options.task is None:
                folder = options.output or run.path
                predict_tables(loaded, folder)
                print(f"predictions: {folder / 'predictions'}")
                return
            task = loaded.tasks[options.task]
            table = table_of_texts(task, options.text, options.file)
            for problem in table.problems:
                print(f"left out: {problem}", file=sys.stderr)
            for answer in answers(loaded, task, table):
                print(json.dumps(answer, ensure_ascii=False) if options.json else _readable(answer))


def predict_tables(loaded: LoadedRun, folder: Path) -> None:
    """Write the prediction files of the dev and test tables of every task under `folder`/predictions."""
    config = loaded.config
    tables = load_tables(config.data, list(loaded.tasks.values()), required=())
    if not any(split in splits for splits in tables.values() for split in ("dev", "test")):
        raise DataError(f"{config.data}: holds neither a dev nor a test table of {', '.join(loaded.tasks)}")
    data = prepare_data(config, tables, loaded.tokeniser)
    predict_all(
        loaded.forward, loaded.tasks, data, max_tokens=config.max_tokens, folder=folder, mode=config.mode
    )


def table_of_texts(task: Task, texts: list[str], file: Path | None) -> Table:
    """An unlabelled table of sentences from the command line or from a file."""
    if file is not None and texts:
        raise ConfigError("give sentences or --file, not both")
    if file is not None and file.suffix != ".txt":
        return dataclasses.replace(read_table(file, task.name, "input", task.layout), labels=None)
    each = len(task.layout.text_columns)
    if file is None:
        if not texts or len(texts) % each:
            wanted = "pairs of sentences" if each == 2 else "at least one sentence"
            raise ConfigError(f"task {task.name} takes {wanted}; found {len(texts)} sentence(s)")
        rows = [(n + 1, tuple(texts[n * each : (n + 1) * each])) for n in range(len(texts) // each)]
        path = Path("command line")
    else:
        rows, path = list(_lines(file, each)), file
    for line, row in rows:
        if not all(text.strip() for text in row):
            raise DataError(f"{path}, {'line' if file else 'example'} {line}: a sentence is empty")
    return Table(
        task=task.name,
        split="input",
        path=path,
        ids=[str(line) for line, _ in rows],
        texts=[row for _, row in rows],
        labels=None,
        lines=[line for line, _ in rows],
    )


def _lines(file: Path, each: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start})") from error
    found = False
    for number, line in enumerate(io.StringIO(content, newline=None), start=1):
        line = line.rstrip("\n")
        if not line.strip():
            continue
        found = True
        row = tuple(line.split("\t")) if each == 2 else (line,)
        if len(row) != each:
            raise DataError(
                f"{file}, line {number}: expected two sentences separated by a tab, found {len(row)}"
            )
        yield number, row
    if not found:
        raise DataError(f"{file}: holds no sentence")


def answers(loaded: LoadedRun, task: Task, table: Table) -> Iterator[dict[str, Any]]:
    """One JSON-able answer a row: id, text, prediction, and the probability of each class."""
    config = loaded.config
    data = task_data(task, config.task[task.name], table, loaded.tokeniser, None)
    predictions = predict_split(loaded.forward, task, data, "input", max_tokens=config.max_tokens)
    values = predictions_from_outputs(task, predictions.outputs)
    chances = None if task.kind == "similarity" else probabilities(task, predictions.outputs)
    for place, identity in enumerate(predictions.ids):
        answer: dict[str, Any] = {"id": identity, "text": list(table.texts[place])}
        if chances is None:
            answer["prediction"] = float(values[place])
        else:
            names = class_names(task)
            answer["prediction"] = int(values[place])
            answer["class"] = names[int(values[place])]
            answer["probabilities"] = {n: float(p) for n, p in zip(names, chances[place], strict=True)}
        yield answer


def _readable(answer: dict[str, Any]) -> str:
    text = " | ".join(answer["text"])
    if "class" not in answer:
        return f"{answer['prediction']:.3f}  {text}"
    name = answer["class"]
    return f"{name} ({answer['probabilities'][name]:.2f})  {text}"


if __name__ == "__main__":
    run_main(main)

"""`python -m mtbert.predict RUN`: prediction files for a run's tables, or answers for sentences of one's own."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mtbert import load
from mtbert.api import Answer
from mtbert.cli import add_trust, config_from_file, run_main
from mtbert.data.tables import read_own_table
from mtbert.engine.build import prepare_data
from mtbert.engine.finish import predict_all
from mtbert.engine.interruptions import memory_errors
from mtbert.engine.load_run import LoadedRun, load_run
from mtbert.engine.precision import product_settings
from mtbert.engine.run_folder import RunFolder
from mtbert.engine.run_log import logging_to
from mtbert.errors import ConfigError, DataError
from mtbert.kernels.dispatch import use_backend
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
        help="a .txt file (a sentence a line, pairs separated by a tab) or a table with the task's columns,"
        " separated by tabs or commas",
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--data", help="tables to predict (default: the run's own)")
    parser.add_argument("--output", type=Path, help="write into OUTPUT/predictions (default: RUN)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_trust(parser)
    options = parser.parse_intermixed_args(arguments)  # sentences may follow --task
    if options.task is None and (options.text or options.file):
        raise ConfigError("--task: name the task that the sentences are for")
    if options.task is None and options.json:
        raise ConfigError(
            "--json is for answers to given sentences: add --task; tables are written as JSON anyway"
        )
    if options.task is not None and (options.data or options.output):
        raise ConfigError("--data and --output are for whole tables; with --task give sentences or --file")
    with logging_to(None):
        run = RunFolder.open(options.run)
        if options.task is None:
            predict_tables(
                run, options.data, options.output, options.device, trust_plugins=options.trust_plugins
            )
            return
        model = load(run.path, device=options.device, trust_plugins=options.trust_plugins)
        task = model.task(options.task)
        rows = list(_given(task, options.text, options.file))
        for (identity, _), answer in zip(
            rows, model.answers(task.name, [texts for _, texts in rows]), strict=True
        ):
            print(_json(identity, answer) if options.json else _readable(answer))


def predict_tables(
    run: RunFolder, data: str | None, output: Path | None, device: str, *, trust_plugins: bool = False
) -> None:
    """Write the prediction files of the dev and test tables of every task of a run under `output`/predictions.

    data: instead of the run's own tables.
    """
    config = config_from_file(run.config_path, trust_plugins=trust_plugins)
    if data is not None:
        if output is None:
            raise ConfigError(f"--output: name a folder; {run.path} keeps the predictions of its own tables")
        config = dataclasses.replace(config, data=data)
    loaded = load_run(run, config, device=device)
    folder = output or run.path
    with (
        memory_errors(config.max_tokens),
        product_settings(loaded.config.precision),
        use_backend(None if config.kernels == "auto" else config.kernels),
    ):
        _write_tables(loaded, folder)
    print(f"predictions: {folder / 'predictions'}")


def _write_tables(loaded: LoadedRun, folder: Path) -> None:
    config = loaded.config
    tables = load_tables(config.data, list(loaded.tasks.values()), required=())
    if not any(split in splits for splits in tables.values() for split in ("dev", "test")):
        raise DataError(f"{config.data}: holds neither a dev nor a test table of {', '.join(loaded.tasks)}")
    data = prepare_data(config, tables, loaded.tokeniser)
    predict_all(
        loaded.forward, loaded.tasks, data, max_tokens=config.max_tokens, folder=folder, mode=config.mode
    )


def _given(task: Task, texts: list[str], file: Path | None) -> Iterator[tuple[str, Any]]:
    """The examples of the command line or of a file, each with its id."""
    if file is not None and texts:
        raise ConfigError("give sentences or --file, not both")
    each = len(task.layout.text_columns)
    rows: Iterable[tuple[str, tuple[str, ...]]]
    if file is not None and file.suffix != ".txt":
        table = read_own_table(file, task.name, task.layout, labelled=False)
        for problem in table.problems:
            print(f"left out: {problem}", file=sys.stderr)
        rows = zip(table.ids, table.texts, strict=True)
    elif file is not None:
        rows = _lines(file, each)
    else:
        if not texts or len(texts) % each:
            wanted = "pairs of sentences" if each == 2 else "at least one sentence"
            raise ConfigError(f"task {task.name} takes {wanted}; found {len(texts)} sentence(s)")
        rows = ((str(n + 1), tuple(texts[n * each : (n + 1) * each])) for n in range(len(texts) // each))
    for identity, row in rows:
        if not all(text.strip() for text in row):
            place = f"{file}, line" if file else "command line, example"
            raise DataError(f"{place} {identity}: a sentence is empty")
        yield identity, row if each == 2 else row[0]


def _lines(file: Path, each: int) -> Iterator[tuple[str, tuple[str, ...]]]:
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
        yield str(number), row
    if not found:
        raise DataError(f"{file}: holds no sentence")


def _json(identity: str, answer: Answer) -> str:
    found: dict[str, Any] = {"id": identity, "text": list(answer.text), "prediction": answer.prediction}
    if answer.name is not None:
        found |= {"class": answer.name, "probabilities": answer.probabilities}
    return json.dumps(found, ensure_ascii=False)


def _readable(answer: Answer) -> str:
    text = " | ".join(answer.text)
    if answer.name is None:
        return f"{answer.prediction:.3f}  {text}"
    return f"{answer.name} ({answer.probabilities[answer.name]:.2f})  {text}"


if __name__ == "__main__":
    run_main(main)

"""`python -m mtbert.augment TASK --data DIR --output FILE.csv`: more training rows, by a language model or without."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from mtbert.augmentation.config import (
    LOCAL_SERVER,
    Augmenter,
    PromptConfig,
    Rewrite,
    SamplingConfig,
    ServerConfig,
    Structured,
)
from mtbert.augmentation.job import Job, prepare, prompter_of, run_job
from mtbert.augmentation.plan import Goal
from mtbert.augmentation.record import plot_path, record_path, summary, write_files
from mtbert.augmentation.validation import Bounds
from mtbert.cli import load_plugins, run_main
from mtbert.errors import ConfigError, Interrupted
from mtbert.tasks.registry import TASKS, get_task

MISSING = 3
"""Exit code: the table was written, with fewer rows than asked for."""


def main(arguments: list[str]) -> None:
    """Make the rows, write them, and say what was made; SystemExit(3) where rows are missing."""
    options = _parser().parse_args(arguments)
    load_plugins(options.plugins)
    job = _job(options)
    _check_output(job, overwrite=options.overwrite)
    prepared = prepare(job)
    if options.dry_run:
        print(f"{job.task.name}: {len(prepared.slots):,} rows would be made of {len(prepared.train):,}")
        if job.offline is None:
            slot = prepared.slots[0]
            structured = job.server.structured != "never"
            message = prompter_of(job, prepared).messages(slot.row(0), slot.number, 0, structured=structured)[
                0
            ]
            print(f"\nThe first request:\n\n{message['content']}")
        return
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            made = run_job(job, prepared)
        except KeyboardInterrupt:
            if job.offline is not None:
                raise
            raise Interrupted(
                f"interrupted; the answers so far are kept in {job.cache_path}, the same command goes on from there"
            ) from None
    print(summary(job, prepared, made, write_files(job, prepared, made)))
    if made.outcome.missing and job.goal.kind != "clean":
        raise SystemExit(MISSING)


def _job(options: argparse.Namespace) -> Job:
    offline = None
    if options.offline is not None:
        offline = tuple(name.strip() for name in options.offline.split(",") if name.strip())
        given = sorted(name for name in _FOR_A_SERVER if getattr(options, name) not in (None, False))
        if given:
            listed = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ConfigError(f"{listed}: would have no effect, because --offline asks no server")
    if options.multiply is not None:
        goal = Goal("multiply", options.multiply, limit=options.limit)
    else:
        goal = Goal("clean" if options.clean else "equalise", limit=options.limit)
    if goal.kind == "clean":
        for name in ("shots", "rewrite"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name}: would have no effect, because --clean shows no examples and rewrites nothing"
                )
    default = Bounds()
    bounds = None
    if options.shortest is not None or options.longest is not None:
        bounds = Bounds(
            default.shortest if options.shortest is None else options.shortest,
            default.longest if options.longest is None else options.longest,
        )
    base_url = options.base_url or os.environ.get("OPENAI_BASE_URL") or LOCAL_SERVER
    values = vars(options) | {"base_url": base_url, "extra_body": _extra_body(options.extra_body)}
    return Job(
        task=get_task(options.task),
        data=options.data,
        output=options.output,
        goal=goal,
        seed=options.seed,
        attempts=options.attempts,
        bounds=bounds,
        offline=offline,
        server=ServerConfig(**_given(ServerConfig, values)),
        sampling=SamplingConfig(**_given(SamplingConfig, values)),
        prompt=PromptConfig(**_given(PromptConfig, values)),
        cache=options.cache,
    )


def _given(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that were given; the others keep their defaults."""
    return {entry.name: values[entry.name] for entry in fields(kind) if values.get(entry.name) is not None}


def _extra_body(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body: expected a JSON object, found {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body: expected a JSON object, found {text!r}")
    return value


def _check_output(job: Job, *, overwrite: bool) -> None:
    """Nothing that is there is replaced unless asked, and never a table of the data."""
    written = (job.output, record_path(job.output), plot_path(job.output))
    if job.cache_path.resolve() in [path.resolve() for path in written]:
        raise ConfigError(f"--cache: {job.cache_path} is written by --output; give another name")
    for path in written:
        if path.exists() and not overwrite:
            raise ConfigError(f"--output: {path} exists; give another name, or --overwrite to replace it")
    for file in job.task.files.values():
        if job.output.resolve() == (Path(job.data) / file).resolve():
            raise ConfigError(f"--output: {job.output} is a table of --data, which is never replaced")


_FOR_A_SERVER = (
    "base_url", "model", "concurrency", "timeout", "retries", "backoff", "structured", "stream", "temperature",
    "top_p", "answer_tokens", "extra_body", "shots", "rewrite", "cache",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mtbert.augment",
        description="More training rows for a task: paraphrases by a language model behind any OpenAI-compatible server"
        " (vLLM, llama.cpp, Ollama, ...), or simple changes without one. Dev and test are never rewritten, never shown"
        " to the model, and no new row repeats them. Training reads the result with --extra-data TASK=FILE.",
        epilog="The key, where the server needs one, is read from the environment, OPENAI_API_KEY. Exit code: 0;"
        f" {MISSING} when the table has fewer rows than asked for; 2 for an error; 130 when interrupted. A killed job"
        " goes on with the same command: answers are kept. --debug shows the traceback of an error.",
    )
    parser.add_argument("task", metavar="TASK", help=f"the task: {', '.join(TASKS)}, or one of --plugins")
    parser.add_argument(
        "--data", required=True, help="folder in the CS224N layout, sample or hub, as for training"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE.csv",
        help="the new table; FILE.json, its record, and FILE-labels.png go beside it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the files of an earlier job")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of rows, examples and changes (0)")
    parser.add_argument(
        "--plugins",
        action="append",
        default=[],
        metavar="FILE.py",
        help="a file that registers tasks; repeatable",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the plan and the first request; ask nothing"
    )

    goal = parser.add_argument_group("what is made (one of)").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--equalise",
        action="store_true",
        help="as many rows of every class as of the largest; scores: of every tenth of their range",
    )
    goal.add_argument(
        "--multiply", type=int, metavar="K", help="K times as many rows: each is rewritten K - 1 times"
    )
    goal.add_argument(
        "--clean",
        action="store_true",
        help="repair the text of every row; the result has the same rows, ids and labels",
    )
    limits = parser.add_argument_group("how much, and what is accepted")
    limits.add_argument("--limit", type=int, metavar="N", help="at most N rows, to try it out")
    limits.add_argument(
        "--attempts", type=int, default=4, metavar="N", help="answers for a row before it is given up (4)"
    )
    limits.add_argument(
        "--shortest",
        type=float,
        metavar="X",
        help="fewest words for each word of the original (0.4; repairs 0.6)",
    )
    limits.add_argument(
        "--longest",
        type=float,
        metavar="X",
        help="most words for each word of the original (2.5; repairs 1.6)",
    )
    offline = parser.add_argument_group("without a server")
    offline.add_argument(
        "--offline",
        metavar="LIST",
        help=f"simple changes instead of paraphrases, which take turns: {','.join(get_args(Augmenter))}",
    )
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--base-url",
        metavar="URL",
        help=f"its address (OPENAI_BASE_URL of the environment, or {LOCAL_SERVER})",
    )
    server.add_argument("--model", help="the model's name there (default: the only one that it has)")
    server.add_argument("--concurrency", type=int, metavar="N", help="requests at once (16)")
    server.add_argument("--timeout", type=float, metavar="SECONDS", help="for one answer (120)")
    server.add_argument(
        "--retries", type=int, metavar="N", help="how often a failed request is sent again (6)"
    )
    server.add_argument(
        "--backoff",
        type=float,
        metavar="SECONDS",
        help="wait before the first of them; doubled each time, with a spread; what a server asks for comes first (1)",
    )
    server.add_argument(
        "--structured",
        choices=get_args(Structured),
        help="ask for JSON by a schema: auto tries it once and remembers when the server refuses (auto)",
    )
    server.add_argument("--stream", action="store_true", help="read answers as they are written")
    server.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="file of all answers by request (FILE.answers.jsonl beside the output)",
    )
    prompt = parser.add_argument_group("the prompt and the answers")
    prompt.add_argument(
        "--shots", type=int, metavar="N", help="examples of each class in a prompt, from train (2)"
    )
    prompt.add_argument(
        "--rewrite",
        choices=get_args(Rewrite),
        help="of a pair: both sentences, or one, drawn for each row (both)",
    )
    prompt.add_argument("--temperature", type=float, metavar="T", help="(0.9)")
    prompt.add_argument("--top-p", type=float, metavar="P", help="(0.95)")
    prompt.add_argument(
        "--answer-tokens",
        type=int,
        metavar="N",
        help="most tokens of an answer (by the row's length; 0: no limit is sent)",
    )
    prompt.add_argument(
        "--extra-body",
        metavar="JSON",
        help='further fields of the request, such as \'{"chat_template_kwargs": {"enable_thinking": false}}\'',
    )
    return parser


if __name__ == "__main__":
    run_main(main)

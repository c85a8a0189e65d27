"""One augmentation from its settings to its files: the new table, its record, and the plot of the labels."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtbert.augmentation.cache import AnswerCache
from mtbert.augmentation.client import ChatClient, Traffic
from mtbert.augmentation.config import PromptConfig, SamplingConfig, ServerConfig
from mtbert.augmentation.generate import Outcome, make_rows
from mtbert.augmentation.language_model import LanguageModel
from mtbert.augmentation.offline import OfflineAugmenter, check_augmenters
from mtbert.augmentation.output import new_rows, repaired_rows
from mtbert.augmentation.plan import Goal, Slot, plan_rows
from mtbert.augmentation.prompt import Prompter
from mtbert.augmentation.validation import Bounds, Validator, load_language
from mtbert.data.held_out import HeldOut
from mtbert.data.tables import Table
from mtbert.errors import ConfigError, DataError
from mtbert.tasks.loading import load_tables
from mtbert.tasks.registry import Task

CLEAN_BOUNDS = Bounds(0.6, 1.6)
_SUFFIXES = (".csv", ".tsv", ".txt")


@dataclass(frozen=True)
class Job:
    """What is to be made, from what, by whom, and where it goes. `offline`: augmenters, instead of the server."""

    task: Task
    data: str
    output: Path
    goal: Goal
    seed: int = 0
    attempts: int = 4
    bounds: Bounds | None = None
    """None: as wide as the goal allows."""
    offline: tuple[str, ...] | None = None
    server: ServerConfig = field(default_factory=ServerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    cache: Path | None = None

    def __post_init__(self) -> None:
        if self.output.suffix not in _SUFFIXES:
            raise ConfigError(
                f"--output: expected a table's name ending in {', '.join(_SUFFIXES)}, found {self.output}"
            )
        if self.attempts < 1:
            raise ConfigError(f"--attempts: expected at least 1, found {self.attempts}")
        if self.offline is not None:
            check_augmenters(self.offline, self.task)
            if self.goal.kind == "clean":
                raise ConfigError(
                    "--clean: repairs need a language model; possible without one: --equalise, --multiply"
                )
        if self.prompt.rewrite == "one" and not self.task.is_pair:
            raise ConfigError(f"--rewrite one: task {self.task.name} has single sentences")

    @property
    def length_bounds(self) -> Bounds:
        """The bounds in force."""
        return self.bounds or (CLEAN_BOUNDS if self.goal.kind == "clean" else Bounds())

    @property
    def cache_path(self) -> Path:
        """The file of the answers; beside the output unless it is given."""
        return self.cache or self.output.with_suffix(".answers.jsonl")


@dataclass(frozen=True)
class Prepared:
    """What a job works on: the tables, the rows that may be rewritten, and the plan."""

    splits: dict[str, Table]
    held_out: HeldOut
    usable: list[int]
    """Training rows that may be rewritten and shown: none of their sentences stands in dev or test, too."""
    slots: list[Slot]

    @property
    def train(self) -> Table:
        """The table that rows are made from."""
        return self.splits["train"]


@dataclass(frozen=True)
class Made:
    """What a job made: the new table with a source for every row, and what happened on the way."""

    table: Table
    sources: list[str]
    outcome: Outcome
    repaired: int = 0
    """Rows that a repair changed."""
    model: str | None = None
    structured: bool | None = None
    traffic: Traffic | None = None
    details: dict[str, str] = field(default_factory=dict)


def prepare(job: Job) -> Prepared:
    """Read the tables and plan the rows. Raises UserError for what is wrong with either."""
    splits = load_tables(job.data, [job.task])[job.task.name]
    held_out = HeldOut(splits)
    train = splits["train"]
    usable = [
        row for row, texts in enumerate(train.texts) if all(held_out.sentence(text) is None for text in texts)
    ]
    if not usable:
        raise DataError(f"{train.path}: every row has a sentence that also stands in dev or test")
    slots = plan_rows(job.task, train, job.goal, usable, attempts=job.attempts, seed=job.seed)
    return Prepared(splits, held_out, usable, slots)


def prompter_of(job: Job, prepared: Prepared) -> Prompter:
    """Who writes the prompts of a job."""
    repair = job.goal.kind == "clean"
    return Prompter(job.task, prepared.train, prepared.usable, job.prompt, repair=repair, seed=job.seed)


def run_job(job: Job, prepared: Prepared) -> Made:
    """Make the rows. Raises UserError where the server, or the file of the answers, is of no use."""
    if job.offline is not None:
        return _offline(job, prepared, job.offline)
    language = load_language()
    with ExitStack() as stack:
        cache = stack.enter_context(AnswerCache(job.cache_path))
        return asyncio.run(_ask(job, prepared, cache, _validator(job, prepared, language=language)))


def _validator(job: Job, prepared: Prepared, **options: object) -> Validator:
    return Validator(
        job.task,
        prepared.train,
        prepared.held_out,
        bounds=job.length_bounds,
        repairs=job.goal.kind == "clean",
        **options,  # type: ignore[arg-type]
    )


def _offline(job: Job, prepared: Prepared, augmenters: Sequence[str]) -> Made:
    author = OfflineAugmenter(prepared.train, augmenters, job.seed)
    validator = _validator(job, prepared, compare="text")
    outcome = asyncio.run(make_rows(prepared.slots, author, validator, attempts=job.attempts))
    return Made(*new_rows(job.task, prepared.train, outcome), outcome)


async def _ask(job: Job, prepared: Prepared, cache: AnswerCache, validator: Validator) -> Made:
    prompter = prompter_of(job, prepared)
    async with ChatClient(job.server, cache) as client:
        model = await client.model()
        title = f"{job.task.name}, {'repairs' if job.goal.kind == 'clean' else 'paraphrases'}"
        author = LanguageModel(
            job.task, prepared.train, prompter, client, model, job.sampling, job.seed, title
        )
        outcome = await make_rows(
            prepared.slots, author, validator, attempts=job.attempts, kept_sentence=prompter.kept_sentence
        )
        facts = {
            "model": model,
            "structured": client.structured,
            "traffic": client.traffic,
            "details": author.details,
        }
    if job.goal.kind == "clean":
        table, sources, repaired = repaired_rows(prepared.train, outcome)
        return Made(table, sources, outcome, repaired, **facts)  # type: ignore[arg-type]
    return Made(*new_rows(job.task, prepared.train, outcome), outcome, **facts)  # type: ignore[arg-type]


def labels_of(table: Table) -> np.ndarray:
    """The labels of a training table."""
    assert table.labels is not None
    return table.labels

"""The sentences that every side reads: a pool of real ones, cut into steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from bench.encoders import encoder_path
from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.build import form_of
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import SAMPLE, load_tables
from mtbert.tasks.registry import Task, get_task

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
REAL = "CS224N tables"
"""The source of real sentences, by name."""
MIX = {"sst": 24, "para": 64, "sts": 17}
"""Examples of each task in a step: these proportions (those of the preset `minilm`), scaled to the tokens."""
MAX_LENGTH = 128
GROUP = 32
_SHORTEST = 8
_AT_LEAST = 4096

Pairs = Literal["cross-encoder", "cosine"]


@dataclass(frozen=True, eq=False)
class Workload:
    """A pool of examples and one way to walk through it.

    Every side reads the whole pool once, in `len(steps)` optimizer steps of nearly equal tokens. `steps` is
    mtbert's own order; a peer composes its batches from the same pool as its users would.
    """

    source: str
    """Where the sentences come from: real tables, or the synthetic sample."""
    encoder_name: str
    encoder: Path
    """Folder of the encoder."""
    tasks: dict[str, Task]
    data: dict[str, TaskData]
    pool: dict[str, np.ndarray]
    """Examples of each task in random order, indices into its data."""
    steps: list[Plan]
    heads: dict[str, HeadConfig]
    """How each task's rows are read."""
    max_length: int
    """Tokens that a row has at most."""
    wanted_tokens: int
    """Of a step, as they were asked for: whole examples come close to it."""

    @property
    def tokens_per_step(self) -> int:
        """Useful tokens of a step, on average."""
        return self.tokens // len(self.steps)

    @property
    def tokens(self) -> int:
        """Useful tokens of the pool."""
        return int(self.row_lengths().sum())

    def row_lengths(self) -> np.ndarray:
        """Tokens of every row of the pool."""
        rows = []
        for name, examples in self.pool.items():
            data = self.data[name]
            if data.rows_per_example == 1:
                rows.append(data.lengths[examples])
            else:
                rows.append(np.array([len(ids) for e in examples.tolist() for ids, _ in data.rows(e)]))
        return np.concatenate(rows)


def build_workload(
    encoder: str,
    *,
    tokens_per_step: int,
    steps: int,
    folder: Path | None = REAL_DATA,
    seed: int = 0,
    pairs: Pairs = "cross-encoder",
    row_tokens: int | None = None,
) -> Workload:
    """Rows of three tasks from `folder`, or from the built-in sample where there is none.

    pairs: `cross-encoder`, one row a pair; or `cosine`, two rows, whose mean-pooled states' cosine is the score.
    row_tokens: make rows of just so many tokens, each out of as many neighbouring examples as that takes.

    `encoder` names the tokeniser (and the model that the sides will train). A pool of a few hundred examples
    is too small to find batches of like length in, as one can in an epoch. So the pool is drawn in groups of GROUP
    examples that are neighbours in length among thousands, at even distances from the shortest to the longest.
    """
    real = folder is not None and all((folder / get_task(name).files["train"]).is_file() for name in MIX)
    tasks = {name: get_task(name) for name in MIX}
    tables = load_tables(str(folder) if real else SAMPLE, list(tasks.values()))
    encoder_folder = encoder_path(encoder)
    tokeniser = Tokeniser.from_folder(encoder_folder)
    generator = np.random.default_rng(seed)

    heads = {name: _head(task, pairs) for name, task in tasks.items()}
    max_length, group = (MAX_LENGTH, GROUP) if row_tokens is None else (row_tokens, 1)

    def read(name: str, rows: np.ndarray) -> TaskData:
        config = TaskConfig(max_length=max_length, head=heads[name])
        joined = 1 if row_tokens is None else row_tokens
        tokenised = tokenise(_rows(tables[name]["train"], rows, joined), tokeniser)
        return TaskData(name, tokenised, form=form_of(tasks[name], config), max_length=max_length)

    total = tokens_per_step * steps
    most = max(_AT_LEAST, total // _SHORTEST) if row_tokens is None else max(GROUP, 2 * total // row_tokens)
    candidates = {name: generator.permutation(len(tables[name]["train"]))[:most] for name in MIX}
    lengths = {name: read(name, candidates[name]).lengths for name in MIX}
    scale = total / sum(MIX[name] * float(lengths[name].mean()) for name in MIX)
    data = {}
    for name in MIX:
        groups = max(1, round(scale * MIX[name] / group))
        data[name] = read(name, candidates[name][_like_lengths(lengths[name], groups, group)])
    pool = {name: generator.permutation(len(data[name])) for name in MIX}
    source = REAL if real else "synthetic sample"
    plans = [{name: _dealt(data[name].lengths, pool[name], k, steps) for name in MIX} for k in range(steps)]
    return Workload(
        source, encoder, encoder_folder, tasks, data, pool, plans, heads, max_length, tokens_per_step
    )


def _head(task: Task, pairs: Pairs) -> HeadConfig:
    """How a task reads its rows: the first token, or mean-pooled states and, for pairs, their cosine."""
    if pairs == "cross-encoder":
        return HeadConfig()
    return HeadConfig(pooling="mean", pair=["cosine"]) if task.is_pair else HeadConfig(pooling="mean")


def _like_lengths(lengths: np.ndarray, groups: int, group: int) -> np.ndarray:
    """`groups` groups of `group` places that follow each other in order of length, spread evenly over that order."""
    order = np.argsort(lengths, kind="stable")
    last = max(0, len(order) - group)
    begins = np.round((np.arange(groups) + 0.5) / groups * last).astype(int)
    return np.concatenate([order[begin : begin + group] for begin in begins])


def _dealt(lengths: np.ndarray, pool: np.ndarray, step: int, steps: int) -> np.ndarray:
    """One step's share of the pool: every so many-th example in order of length, as TaskBatches deals them."""
    return pool[np.argsort(lengths[pool], kind="stable")][step::steps]


def _rows(table: Table, chosen: np.ndarray, joined: int) -> Table:
    """The chosen examples, each with the texts of the next `joined` - 1 examples of the table after its own."""
    places = chosen.tolist()
    assert table.labels is not None
    size = len(table.texts)
    return dataclasses.replace(
        table,
        ids=[table.ids[i] for i in places],
        texts=[
            tuple(map(" ".join, zip(*(table.texts[(i + k) % size] for k in range(joined)), strict=True)))
            for i in places
        ],
        labels=table.labels[chosen],
        lines=[table.lines[i] for i in places],
    )

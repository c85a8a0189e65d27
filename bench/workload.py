"""The sentences that every side reads: a pool of real ones, cut into steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.engine.build import form_of
from mtbert.model.pretrained import resolve
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.loading import SAMPLE, load_tables
from mtbert.tasks.registry import Task, get_task

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MIX = {"sst": 24, "para": 64, "sts": 17}
"""Examples of each task in a step: these proportions (those of the preset `minilm`), scaled to the tokens."""
MAX_LENGTH = 128
GROUP = 32
_SHORTEST = 8
_AT_LEAST = 4096


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
    """Folder of the pretrained encoder."""
    tasks: dict[str, Task]
    data: dict[str, TaskData]
    pool: dict[str, np.ndarray]
    """Examples of each task in random order, indices into its data."""
    steps: list[Plan]

    @property
    def tokens(self) -> int:
        """Useful tokens of the pool."""
        return int(self.row_lengths().sum())

    def row_lengths(self) -> np.ndarray:
        """Tokens of every row of the pool (an example is one row here)."""
        return np.concatenate([self.data[name].lengths[examples] for name, examples in self.pool.items()])


def build_workload(
    encoder: str, *, tokens_per_step: int, steps: int, folder: Path | None = REAL_DATA, seed: int = 0
) -> Workload:
    """Cross-encoder rows of three tasks from `folder`, or from the built-in sample where there is none.

    `encoder` names the tokeniser (and the model that the sides will train). A pool of a few hundred examples
    is too small to find batches of like length in, as one can in an epoch. So the pool is drawn in groups of GROUP
    examples that are neighbours in length among thousands, at even distances from the shortest to the longest.
    """
    real = folder is not None and all((folder / get_task(name).files["train"]).is_file() for name in MIX)
    tasks = {name: get_task(name) for name in MIX}
    tables = load_tables(str(folder) if real else SAMPLE, list(tasks.values()))
    encoder_folder = resolve(encoder)
    tokeniser = Tokeniser.from_folder(encoder_folder)
    generator = np.random.default_rng(seed)

    def read(name: str, rows: np.ndarray) -> TaskData:
        config = TaskConfig(max_length=MAX_LENGTH)
        tokenised = tokenise(_rows(tables[name]["train"], rows), tokeniser)
        return TaskData(name, tokenised, form=form_of(tasks[name], config), max_length=MAX_LENGTH)

    total = tokens_per_step * steps
    most = max(_AT_LEAST, total // _SHORTEST)
    candidates = {name: generator.permutation(len(tables[name]["train"]))[:most] for name in MIX}
    lengths = {name: read(name, candidates[name]).lengths for name in MIX}
    scale = total / sum(MIX[name] * float(lengths[name].mean()) for name in MIX)
    data = {}
    for name in MIX:
        groups = max(1, round(scale * MIX[name] / GROUP))
        data[name] = read(name, candidates[name][_like_lengths(lengths[name], groups)])
    pool = {name: generator.permutation(len(data[name])) for name in MIX}
    source = "CS224N tables" if real else "synthetic sample"
    plans = [{name: _dealt(data[name].lengths, pool[name], k, steps) for name in MIX} for k in range(steps)]
    return Workload(source, encoder, encoder_folder, tasks, data, pool, plans)


def _like_lengths(lengths: np.ndarray, groups: int) -> np.ndarray:
    """`groups` groups of GROUP places that follow each other in order of length, spread evenly over that order."""
    order = np.argsort(lengths, kind="stable")
    last = max(0, len(order) - GROUP)
    begins = np.round((np.arange(groups) + 0.5) / groups * last).astype(int)
    return np.concatenate([order[begin : begin + GROUP] for begin in begins])


def _dealt(lengths: np.ndarray, pool: np.ndarray, step: int, steps: int) -> np.ndarray:
    """One step's share of the pool: every so many-th example in order of length, as TaskBatches deals them."""
    return pool[np.argsort(lengths[pool], kind="stable")][step::steps]


def _rows(table: Table, chosen: np.ndarray) -> Table:
    places = chosen.tolist()
    assert table.labels is not None
    return dataclasses.replace(
        table,
        ids=[table.ids[i] for i in places],
        texts=[table.texts[i] for i in places],
        labels=table.labels[chosen],
        lines=[table.lines[i] for i in places],
    )

"""What an objective beside the task losses is: a loss whose parts belong to tasks, over rows of the packed pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Segment
from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable
from mtbert.errors import ConfigError
from mtbert.model.dropout import DropoutStream
from mtbert.model.heads import Pooling
from mtbert.model.multitask import MultiTaskModel
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import Task


@dataclass(frozen=True)
class Again:
    """What one more forward pass over some of a pass's rows gives."""

    batch: PackedBatch
    rows: dict[str, Tensor]
    """Pooled rows `[rows, C]` of each stream."""
    outputs: dict[str, Tensor]
    """`[n, outputs]` of each stream with a head."""


class Pass(Protocol):
    """What an objective sees of one forward pass of a training step."""

    step: int
    """Steps taken before this one."""
    progress: float
    """Share of the training that is done, 0 to 1."""
    segments: tuple[Segment, ...]
    rows: Mapping[str, Tensor]
    """Pooled rows `[rows, C]` float32 of each stream."""
    outputs: Mapping[str, Tensor]
    """`[n, outputs]` of each stream with a head: the tasks' own."""
    examples: Mapping[str, np.ndarray]
    """The examples of every stream in the whole step, of which this pass may hold a part."""

    def segment(self, stream: str) -> Segment | None:
        """The segment of a stream; None when this pass holds none of it."""

    def examples_by_rank(self, stream: str) -> Sequence[np.ndarray]:
        """The examples of a stream, int64 [n], that each rank has in this pass: one array where there is one rank."""

    def rows_of_all_ranks(self, own: Tensor | None, counts: Sequence[int], texts: int) -> Tensor:
        """Embeddings `[sum(counts), texts, C]` of all ranks in their order, a gradient flowing to the rank's own.

        own: `[counts[rank], texts, C]`, None for none. All ranks call it together, with the same counts.
        """

    def sub_batch(self, streams: Sequence[str]) -> PackedBatch:
        """The packed rows of those streams alone, in the order of the pass."""

    def fresh_dropout(self) -> DropoutStream | None:
        """Masks that no other forward pass of this step has."""

    def again(
        self,
        streams: Sequence[str],
        *,
        dropout: DropoutStream | None,
        noise: Tensor | None = None,
        trained: bool = True,
        model: MultiTaskModel | None = None,
        dtype: torch.dtype | None = None,
    ) -> Again:
        """One more forward pass over `sub_batch(streams)`.

        noise: `[T, C]`, added to the embeddings' output. trained: whether parameters get a gradient from it. model: a
        teacher instead of the trained model, which shares all that is never trained. dtype: what the encoder computes
        in, by default as in the pass itself.
        """


class Objective(ABC):
    """A loss beside the task losses. Each part of it belongs to one task: gradient surgery tells them apart."""

    name: str
    """Names its streams and its lines in the log: `{task}/{name}`."""

    def streams(self) -> Mapping[str, TaskData]:
        """Rows that it packs beside the tasks' own, under names `{task}/{name}`."""
        return {}

    def poolings(self) -> Mapping[str, Pooling]:
        """How the rows of each of its streams are pooled."""
        return {}

    def examples(self, plan: Plan, step: int) -> Mapping[str, np.ndarray]:
        """The examples of its streams that go with a step's plan: a function of its arguments and the run's seed.

        Called once a step and in their order, while steps before it may still be computed: it keeps nothing for
        `losses`, which finds the examples in its pass.
        """
        return {}

    @abstractmethod
    def losses(self, run: Pass) -> Mapping[str, Tensor]:
        """0-d losses by task, the objective's weight in them; what a step's passes give adds up to the step's loss.

        Tasks without rows in this pass are left out.
        """

    def after_step(self) -> None:  # noqa: B027
        """Called after every update of the parameters."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep, by name."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on from a state of `state()`."""


@dataclass(frozen=True)
class ObjectiveContext:
    """What objectives are built from; every mapping is by task."""

    tasks: Mapping[str, Task]
    task_configs: Mapping[str, TaskConfig]
    tables: Mapping[str, Mapping[str, Table]]
    """Tables by task and split."""
    tokenised: Mapping[str, TokenisedTable]
    """The training tables' tokens."""
    data: Mapping[str, TaskData]
    """The training examples as the heads read them."""
    model: MultiTaskModel
    mode: str
    seed: int
    device: torch.device
    dtype: torch.dtype


def check_tasks(field: str, names: Sequence[str], possible: Sequence[str], why: str = "") -> None:
    """Raise ConfigError unless `names` are different members of `possible`. `why` says what makes a task possible."""
    for name in names:
        if name not in possible:
            listed = ", ".join(possible) if possible else "none of this run's tasks"
            raise ConfigError(f"{field}: {name!r} is not possible{why and f' ({why})'}; possible: {listed}")
    if len(set(names)) != len(names):
        raise ConfigError(f"{field}: a task is named twice in {list(names)}")

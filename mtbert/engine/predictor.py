"""Texts in, numbers out: a trained model's outputs and sentence vectors for texts that stand in no table."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from mtbert.data.dataset import TaskData, Truncate
from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable, Tokeniser, tokenise
from mtbert.engine.build import Machine, form_of
from mtbert.engine.forward import PackedForward
from mtbert.engine.inference import infer, pooled_rows
from mtbert.kernels.casts import WeightCasts
from mtbert.model.multitask import MultiTaskModel
from mtbert.model.pooling import Pooling
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import Task

Example = tuple[str, ...]
"""The texts of an example: one, or the two of a pair."""

_HEAD_BLOCK = 8192

_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class Space:
    """How sentences become vectors: `[CLS] sentence [SEP]`, pooled, and maybe through the towers of a task's head."""

    pooling: Pooling
    max_length: int
    """Tokens of a sentence, [CLS] and [SEP] included; longer ones are truncated."""
    task: str | None = None
    """Whose adapters and towers they pass, where there are any."""
    truncate: Truncate = "head"
    towers: bool = False


class Predictor:
    """Outputs and vectors of texts, for a model that is not trained meanwhile.

    Texts that occur several times in a call are computed once; a task that reads a pair as two rows computes each
    different sentence once, however many pairs it is in.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        tokeniser: Tokeniser,
        machine: Machine,
        tasks: Mapping[str, Task],
        settings: Mapping[str, TaskConfig],
        *,
        max_tokens: int,
    ) -> None:
        """settings: how each task's texts are read. max_tokens: of a pass; a longer text is a pass of its own."""
        self.model = model
        self.tokeniser = tokeniser
        self.machine = machine
        self.tasks = dict(tasks)
        self.settings = settings
        self.max_tokens = max_tokens
        self._forward = PackedForward(model, machine.device, machine.dtype)
        self._casts = WeightCasts(model.parameters())

    def outputs(self, name: str, examples: Sequence[Example]) -> np.ndarray:
        """What the task's head says: [n, outputs] float32, logits or scores in label units."""
        different, which = _distinct(examples)
        if not different:
            return np.zeros((0, self.tasks[name].outputs), dtype=np.float32)
        if self._reads_two_rows(name):
            rows, pairs = self._rows_of_pairs(name, different)
            return self._head(name, rows, pairs)[which]
        task, settings = self.tasks[name], self.settings[name]
        data = TaskData(
            name,
            self._tokenised(name, different),
            form=form_of(task, settings),
            max_length=settings.max_length,
            truncate=settings.truncate,
        )
        found = infer(self._forward, data, max_tokens=self._budget(data), casts=self._casts)
        return found[which]

    def both_ways(self, name: str, pairs: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Outputs of these pairs, and of the same with their sentences swapped: [n, outputs] float32 each.

        A head that compares two rows gets the same rows at the same places both times: features without an order give
        the same outputs, bit for bit.
        """
        if self._reads_two_rows(name) and len(pairs):
            rows, places = self._rows_of_pairs(name, pairs)
            return self._head(name, rows, places), self._head(name, rows, places[:, ::-1])
        return self.outputs(name, pairs), self.outputs(name, [(b, a) for a, b in pairs])

    def vectors(self, sentences: Sequence[str], space: Space) -> np.ndarray:
        """[n, C] float32."""
        different, which = _distinct(sentences)
        rows = self._rows(different, space)
        if space.towers and space.task is not None and len(rows):
            head = self.model.head(space.task)
            with torch.inference_mode():
                rows = np.concatenate(
                    [head.climb(block).float().cpu().numpy() for block in self._blocks(rows)]
                )
        return rows if len(different) == len(sentences) else rows[which]

    def space_of(self, name: str, *, towers: bool) -> Space:
        """How the task's own head reads a sentence."""
        settings = self.settings[name]
        return Space(settings.head.pooling, settings.max_length, name, settings.truncate, towers)

    def _reads_two_rows(self, name: str) -> bool:
        return self.model.head(name).rows_per_example == 2

    def _rows_of_pairs(self, name: str, pairs: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """The pooled rows [m, C] of the different sentences, and which two make each pair: int64 [n, 2]."""
        sentences, which = _distinct([text for pair in pairs for text in pair])
        return self._rows(sentences, self.space_of(name, towers=False)), which.reshape(-1, 2)

    def _rows(self, sentences: Sequence[str], space: Space) -> np.ndarray:
        """Pooled rows [n, C]."""
        stream = f"{space.task or 'text'}/{space.pooling} vectors"
        if stream not in self.model.probe_poolings:
            self.model.add_probe(stream, space.pooling)
        data = TaskData(
            stream,
            self._tokenised(stream, [(sentence,) for sentence in sentences]),
            form="single",
            max_length=space.max_length,
            truncate=space.truncate,
            task=space.task or "text",
        )
        return pooled_rows(self._forward, data, max_tokens=self._budget(data), casts=self._casts)

    @torch.inference_mode()
    def _head(self, name: str, rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """The head's outputs for pairs of pooled rows."""
        head = self.model.head(name)
        both = rows[pairs.reshape(-1)]
        return np.concatenate([head(block).float().cpu().numpy() for block in self._blocks(both)])

    def _blocks(self, rows: np.ndarray, size: int = _HEAD_BLOCK) -> Iterable[torch.Tensor]:
        """Some rows at a time, on the device."""
        for start in range(0, len(rows), size):
            yield torch.from_numpy(rows[start : start + size]).to(self.machine.device)

    def _tokenised(self, name: str, examples: Sequence[Example]) -> TokenisedTable:
        numbers = range(len(examples))
        table = Table(
            name, "input", Path("input"), [str(n) for n in numbers], list(examples), None, list(numbers)
        )
        return tokenise(table, self.tokeniser)

    def _budget(self, data: TaskData) -> int:
        return max(self.max_tokens, int(data.lengths.max(initial=0)))


def _distinct(values: Sequence[_T]) -> tuple[list[_T], np.ndarray]:
    """The different values in the order of their first occurrence, and which of them each is: int64 [n]."""
    numbers: dict[_T, int] = {}
    which = np.fromiter((numbers.setdefault(v, len(numbers)) for v in values), np.int64, len(values))
    return list(numbers), which

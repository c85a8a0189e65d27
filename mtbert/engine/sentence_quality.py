"""How good the sentence embeddings of a model in training are: alignment and uniformity on one task's dev sentences."""

from __future__ import annotations

import numpy as np

from mtbert.data.dataset import TaskData, Truncate
from mtbert.data.tokenisation import TokenisedTable
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.forward import Forward
from mtbert.engine.inference import pooled_rows
from mtbert.errors import DataError
from mtbert.evaluation.embedding_quality import EmbeddingQuality, probe
from mtbert.model.heads import Pooling
from mtbert.tasks.registry import Task


class SentenceQuality:
    """Measures when it is called. Its sentences are a probe `{task}/quality` of the model, which trains nothing."""

    def __init__(
        self,
        forward: Forward,
        task: Task,
        tokenised: TokenisedTable,
        examples: np.ndarray,
        *,
        pooling: Pooling,
        max_length: int,
        max_tokens: int,
        truncate: Truncate = "head",
        world: World = ALONE,
    ) -> None:
        """`tokenised` is the task's labelled dev table, `examples` int64 [n] are those of it to measure on.

        world: its ranks share the passes.
        """
        if tokenised.table.labels is None:
            raise DataError(f"{tokenised.table.path}: has no labels")
        self.forward = forward
        self.probe = probe(task, tokenised.table.labels, examples)
        self.data = TaskData.of_texts(
            f"{task.name}/quality",
            tokenised,
            self.probe.texts[:, None],
            task=task.name,
            max_length=max_length,
            truncate=truncate,
        )
        self.max_tokens = max_tokens
        self.world = world
        forward.model.add_probe(self.data.name, pooling)

    def __call__(self) -> EmbeddingQuality:
        """Quality of the embeddings, without dropout."""
        return self.probe.measure(self.embeddings())

    def embeddings(self) -> np.ndarray:
        """Pooled rows [m, C] of the probe's texts."""
        return pooled_rows(self.forward, self.data, max_tokens=self.max_tokens, world=self.world)

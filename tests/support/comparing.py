"""What tests of objectives that compare embeddings share: tables of token lists, a context, passes without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mtbert.data.dataset import TaskData
from mtbert.data.packing import PackedBatch, Segment, pack, plan_passes
from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable
from mtbert.losses.objective import Objective, ObjectiveContext
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig
from mtbert.tasks.registry import get_task

CLS, SEP, VOCABULARY, WIDTH = 1, 2, 64, 5

Text = Sequence[int]


def tokenised(task: str, examples: Sequence[Sequence[Text]], labels: Sequence[float]) -> TokenisedTable:
    """A table whose example i has the texts `examples[i]`, each a list of token ids."""
    kind = get_task(task).layout.labels.dtype
    texts = [text for example in examples for text in example]
    words = [tuple(" ".join(map(str, text)) for text in example) for example in examples]
    names = [f"{task}{i}" for i in range(len(examples))]
    lines = list(range(2, len(examples) + 2))
    table = Table(task, "train", Path(f"{task}.csv"), names, words, np.asarray(labels, dtype=kind), lines)
    return TokenisedTable(
        table,
        np.array([token for text in texts for token in text], dtype=np.int32),
        np.cumsum([0, *map(len, texts)]),
        len(examples[0]),
        CLS,
        SEP,
    )


def context(
    tables: Mapping[str, TokenisedTable],
    *,
    batch_size: int = 8,
    mode: str = "full",
    head: HeadConfig | None = None,
    seed: int = 0,
) -> ObjectiveContext:
    """A run with these tasks; pairs are read by a cross-encoder unless `head` says otherwise."""
    configs, data = {}, {}
    for name, table in tables.items():
        pair = get_task(name).is_pair
        own = replace(head or HeadConfig(), pair="cross-encoder") if not pair else head or HeadConfig()
        configs[name] = TaskConfig(batch_size=batch_size, max_length=32, head=own)
        form = "single" if not pair else "cross" if own.pair == "cross-encoder" else "pair-rows"
        data[name] = TaskData(name, table, form=form, max_length=32)  # type: ignore[arg-type]
    return ObjectiveContext(
        tasks={name: get_task(name) for name in tables},
        task_configs=configs,
        tables={name: {"train": table.table} for name, table in tables.items()},
        tokenised=tables,
        data=data,
        model=cast(Any, None),
        mode=mode,
        seed=seed,
        device=torch.device("cpu"),
        dtype=torch.float64,
    )


class BagPass:
    """A pass whose rows are the mean of their tokens' vectors, and a deviation that each row of the step has."""

    def __init__(
        self,
        batch: PackedBatch,
        vectors: Tensor,
        deviations: Tensor | None,
        progress: float,
        examples: Mapping[str, np.ndarray],
    ) -> None:
        self.step = 0
        self.examples = examples
        self.progress = progress
        self.segments = batch.segments
        self.outputs: dict[str, Tensor] = {}
        self.rows = {
            segment.stream: torch.stack([self._row(batch, row, vectors, deviations) for row in segment.rows])
            for segment in batch.segments
        }

    @staticmethod
    def _row(batch: PackedBatch, row: int, vectors: Tensor, deviations: Tensor | None) -> Tensor:
        begin, end = batch.cu_seqlens[row : row + 2].tolist()
        mean = vectors[batch.input_ids[begin:end].long()].mean(0)
        return mean if deviations is None else mean + deviations[int(batch.dropout_row[begin]) // 4096]

    def segment(self, stream: str) -> Segment | None:
        return next((s for s in self.segments if s.stream == stream), None)

    def examples_by_rank(self, stream: str) -> list[np.ndarray]:
        segment = self.segment(stream)
        return [np.zeros(0, dtype=np.int64) if segment is None else segment.examples]


def bag(text: Text, vectors: Tensor) -> Tensor:
    """The row of a text in a BagPass without deviations."""
    return vectors[torch.tensor([CLS, *text, SEP])].mean(0)


def token_vectors(seed: int = 0) -> Tensor:
    """A vector for each token, float64, with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def passes(
    objective: Objective,
    run: ObjectiveContext,
    plan: Mapping[str, np.ndarray],
    vectors: Tensor,
    *,
    max_tokens: int = 4096,
    deviations: Tensor | None = None,
    progress: float = 0.0,
    step: int = 0,
) -> Iterator[BagPass]:
    """The passes of a step, with the objective's streams beside their tasks."""
    data = {**run.data, **objective.streams()}
    examples = objective.examples(dict(plan), step)
    streams: dict[str, np.ndarray] = {}
    for task, chosen in plan.items():
        streams[task] = chosen
        streams.update({name: rows for name, rows in examples.items() if data[name].task == task})
    for requests in plan_passes(streams, data, max_tokens):
        yield BagPass(pack(requests), vectors, deviations, progress, streams)


def step_losses(
    objective: Objective,
    run: ObjectiveContext,
    plan: Mapping[str, Sequence[int]],
    vectors: Tensor,
    **settings: Any,
) -> dict[str, Tensor]:
    """The losses of a step by task, summed over its passes."""
    total: dict[str, Tensor] = {}
    chosen = {task: np.array(examples, dtype=np.int64) for task, examples in plan.items()}
    for found in passes(objective, run, chosen, vectors, **settings):
        for task, loss in objective.losses(cast(Any, found)).items():
            total[task] = total[task] + loss if task in total else loss
    return total

"""The plain step of the course's papers: `mtbert/reference`, padded, one task after another, in float32."""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from bench.measure import Side
from bench.memory import peak_bytes
from bench.workload import Workload
from mtbert import reference
from mtbert.model.pretrained import hugging_face_views, load_config, load_encoder
from mtbert.optim.adamw import OptimizerConfig

_NAMES = (
    (r"^embeddings\.(word|position|token_type)_embeddings", r"embeddings.\1"),
    (r"^embeddings\.LayerNorm", "embeddings.norm"),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", ".attention."),
    (r"\.attention\.output\.dense", ".attention_output"),
    (r"\.attention\.output\.LayerNorm", ".attention_norm"),
    (r"\.output\.LayerNorm", ".output_norm"),
    (r"\.(intermediate|output)\.dense", r".\1"),
    (r"^pooler\.dense", "pooler"),
)
"""From Hugging Face's names to the reference's."""


class PapersLoop:
    """A batch of every task, padded to its longest and encoded by itself; one backward pass from their losses' sum."""

    def __init__(
        self, workload: Workload, device: torch.device, *, dropout: float = 0.1, seed: int = 0
    ) -> None:
        """Cross-encoder rows, heads on the first token. A task's batch is all of its examples of a step."""
        torch.manual_seed(seed)
        config = OptimizerConfig()
        self.workload = workload
        self.device = device
        self.model = build_reference(workload, dropout).to(device)
        self.optimizer = reference.make_optimizer(self.model, config.lr, config.weight_decay)
        self.clip_norm = config.clip_norm

    def __call__(self, repeat: int) -> float:
        """Train on the examples of one step; returns its useful tokens."""
        batches, tokens = self.batches(repeat)
        reference.training_step(self.model, self.optimizer, batches, max_norm=self.clip_norm)
        return tokens

    def batches(self, repeat: int) -> tuple[list[reference.TaskBatch], int]:
        """A padded batch of every task, and their useful tokens."""
        batches, tokens = [], 0
        for name, examples in self.workload.steps[repeat % len(self.workload.steps)].items():
            task, data = self.workload.tasks[name], self.workload.data[name]
            assert data.labels is not None
            labels = torch.from_numpy(data.labels[examples]).to(self.device)
            rows = self._pad([row for example in examples.tolist() for row in data.rows(example)])
            batches.append(reference.TaskBatch(name, task.kind, labels, rows, score_range=task.score_range))
            tokens += int(data.lengths[examples].sum())
        return batches, tokens

    def activation_bytes(self) -> tuple[int, int]:
        """Useful tokens of a step, and the peak of its forward and backward passes, gradients aside."""
        batches, tokens = self.batches(0)

        def accumulate() -> None:
            losses = [reference.task_loss(each, self.model(each.task, each.first)) for each in batches]
            torch.stack(losses).sum().backward()

        accumulate()
        return tokens, peak_bytes(accumulate, self.device)

    def _pad(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> reference.Rows:
        shape = len(rows), max(len(ids) for ids, _ in rows)
        ids, types = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for line, (row_ids, row_types) in enumerate(rows):
            ids[line, : len(row_ids)] = torch.from_numpy(row_ids)
            types[line, : len(row_ids)] = torch.from_numpy(row_types)
            mask[line, : len(row_ids)] = True
        return reference.Rows(ids.to(self.device), types.to(self.device), mask.to(self.device))


def papers_side(name: str, loop: PapersLoop) -> Side:
    """One optimizer step a repeat."""
    padded = real = 0
    for number in range(len(loop.workload.steps)):
        batches, tokens = loop.batches(number)
        padded += sum(batch.first.input_ids.numel() for batch in batches)
        real += tokens
    return Side(name, loop, {"padding_share": 1 - real / padded}, loop.activation_bytes)


def build_reference(workload: Workload, dropout: float) -> reference.MultitaskBert:
    """The reference with the workload's encoder and a linear head on the first token for each task."""
    config = load_config(workload.encoder)
    names = {field.name for field in fields(reference.BertConfig)}
    sizes = {name: value for name, value in vars(config).items() if name in names}
    rates = {f"{place}_dropout": dropout for place in ("embedding", "attention", "hidden")}
    bert = reference.MinBert(reference.BertConfig(**sizes, **rates))
    bert.load_state_dict(_weights(workload))
    heads = {
        name: reference.Head(
            name, config.hidden_size, task.outputs, dropout=dropout, score_range=task.score_range
        )
        for name, task in workload.tasks.items()
    }
    return reference.MultitaskBert(bert, heads)


def _weights(workload: Workload) -> dict[str, Tensor]:
    """The encoder's parameters by the names that the reference gives them."""
    found = {}
    for name, value in hugging_face_views(load_encoder(workload.encoder)):
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        found[name] = value.detach().clone()
    return found

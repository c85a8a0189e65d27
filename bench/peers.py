"""What a user would take instead: a plain loop over `transformers`, with `peft` for LoRA.

The same encoder weights, heads (dropout and a linear layer on [CLS], pairs read by a cross-encoder), dropout, losses,
optimizer settings and sentences as mtbert's sides, tokenised beforehand. The loop pads each batch of 32
examples of one task to its longest, and accumulates batches until it has the tokens of a step.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Side
from bench.memory import peak_bytes
from bench.workload import GROUP, Workload
from mtbert.data.dataset import TaskData
from mtbert.model.lora import LoraConfig
from mtbert.optim.adamw import OptimizerConfig
from mtbert.tasks.registry import Task

BATCH = GROUP


def is_installed(*packages: str) -> bool:
    """Whether all of these can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


PACKAGES = ("transformers", "peft", "sentence_transformers", "accelerate", "datasets")
"""The peers, and what they need."""


def peer_versions() -> dict[str, str]:
    """Versions of the installed peers."""
    return {name.replace("_", "-"): metadata.version(name) for name in PACKAGES if is_installed(name)}


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of one task that go through the encoder together."""

    task: str
    examples: np.ndarray


class PlainModel(nn.Module):
    """A Hugging Face encoder with a linear head a task on the dropped-out [CLS] state."""

    def __init__(self, encoder: nn.Module, width: int, outputs: dict[str, int], dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in outputs.items()})

    def forward(self, task: str, ids: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        """Outputs [n, outputs] of a padded batch [n, L]."""
        hidden = self.encoder(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
        return self.heads[task](self.dropout(hidden[:, 0]))


class PlainLoop:
    """A training loop as in the libraries' tutorials: autocast, accumulation, clipping, fused AdamW."""

    def __init__(
        self,
        workload: Workload,
        device: torch.device,
        *,
        dtype: torch.dtype,
        bucketed: bool,
        step_every_batch: bool = False,
        compiled: bool = False,
        batch: int = BATCH,
        lora: LoraConfig | None = None,
        dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        """bucketed: batches of examples of like length, as `group_by_length` makes them; else shuffled ones.
        step_every_batch: update after each batch of 32, as most loops do, instead of accumulating a step's tokens.
        batch: examples that go through the encoder together.
        compiled: the encoder under torch.compile, for any batch and length, so that it compiles once."""
        self.workload = workload
        self.device = device
        self.dtype = dtype
        self.model = build_model(workload, lora, dropout, seed).to(device).train()
        if compiled:
            self.model.encoder.compile(dynamic=True)
        self.optimizer = build_optimizer(self.model, OptimizerConfig())
        self.step_every_batch = step_every_batch
        self.clip_norm = OptimizerConfig().clip_norm
        self.rows = {name: _rows(data, workload.pool[name]) for name, data in workload.data.items()}
        self.steps = _cut(workload, _batches(workload, bucketed, batch, np.random.default_rng(seed)))

    def __call__(self, repeat: int) -> float:
        """Train on the batches of one step; returns its useful tokens."""
        step = self.steps[repeat % len(self.steps)]
        parts = [[batch] for batch in step] if self.step_every_batch else [step]
        tokens = 0
        for part in parts:
            tokens += self.accumulate(part)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        return tokens

    def accumulate(self, step: list[Batch]) -> int:
        """Leaves the gradient of these batches in `.grad`; returns their useful tokens."""
        examples: dict[str, int] = {}
        for batch in step:
            examples[batch.task] = examples.get(batch.task, 0) + len(batch.examples)
        self.optimizer.zero_grad(set_to_none=True)
        return sum(self._pass(batch, examples[batch.task]) for batch in step)

    def activation_bytes(self) -> tuple[int, int]:
        """Useful tokens of the first step's batches, and the peaks of their forward and backward passes, added up: of a
        loop that accumulates, each batch counts by itself. Gradients, which are there before, don't count."""
        tokens = held = 0
        self.accumulate(self.steps[0])
        for batch in self.steps[0]:
            found: list[int] = []
            held += peak_bytes(
                lambda batch=batch, found=found: found.append(self._pass(batch, BATCH)), self.device
            )
            tokens += found[0]
        return tokens, held

    def _pass(self, batch: Batch, examples: int) -> int:
        """Adds the gradient of a batch of a step with so many `examples` of its task; returns its useful tokens."""
        ids, types, mask, labels, real = self._collate(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            outputs = self.model(batch.task, ids, types, mask)
        loss = _loss_sum(self.workload.tasks[batch.task], outputs.float(), labels)
        (loss / examples).backward()
        return real

    def _collate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        rows = [self.rows[batch.task][example] for example in batch.examples.tolist()]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for line, (row_ids, row_types) in enumerate(rows):
            ids[line, : len(row_ids)] = row_ids
            types[line, : len(row_ids)] = row_types
            mask[line, : len(row_ids)] = 1
        labels = self.workload.data[batch.task].labels
        assert labels is not None
        chosen = torch.from_numpy(labels[batch.examples])
        real = sum(len(ids) for ids, _ in rows)
        moved = [x.to(self.device, non_blocking=True) for x in (ids, types, mask, chosen)]
        return moved[0], moved[1], moved[2], moved[3], real


def loop_side(name: str, loop: PlainLoop) -> Side:
    """One optimizer step of a plain loop a repeat."""
    return Side(name, loop, {"padding_share": padding_share(loop)}, loop.activation_bytes)


def padding_share(loop: PlainLoop) -> float:
    """The part of the loop's tokens that are padding."""
    padded = real = 0
    for batch in (batch for step in loop.steps for batch in step):
        lengths = loop.workload.data[batch.task].lengths[batch.examples]
        padded += int(lengths.max()) * len(lengths)
        real += int(lengths.sum())
    return 1 - real / padded


def build_model(workload: Workload, lora: LoraConfig | None, dropout: float, seed: int) -> PlainModel:
    """The encoder of the workload with fresh heads; with `lora`, frozen under adapters of peft."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    encoder: Any = AutoModel.from_pretrained(
        workload.encoder,
        add_pooling_layer=False,
        attn_implementation="sdpa",
        dtype=torch.float32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    width = encoder.config.hidden_size
    if lora is not None:
        import peft

        names = {"attention_output": "attention.output.dense", "intermediate": "intermediate.dense"}
        names["output"] = r"\d+.output.dense"
        chosen = "|".join(names.get(projection, projection) for projection in lora.projections)
        encoder = peft.get_peft_model(
            encoder,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]
                lora_dropout=lora.dropout,
                target_modules=rf".*\.({chosen})",
            ),
        )
    return PlainModel(encoder, width, {n: task.outputs for n, task in workload.tasks.items()}, dropout)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW, decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def _loss_sum(task: Task, outputs: Tensor, labels: Tensor) -> Tensor:
    if task.kind == "classification":
        return F.cross_entropy(outputs, labels, reduction="sum")
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), labels.float(), reduction="sum")
    assert task.score_range is not None
    low, high = task.score_range
    return F.mse_loss(outputs.squeeze(-1), (labels.float() - low) / (high - low), reduction="sum")


def _rows(data: TaskData, pool: np.ndarray) -> dict[int, tuple[Tensor, Tensor]]:
    """(ids, types) int64 of every example of the pool: what a tokeniser's output holds, without padding."""
    rows = {}
    for example in np.unique(pool).tolist():
        ((ids, types),) = data.rows(example)
        rows[example] = torch.from_numpy(ids).long(), torch.from_numpy(types).long()
    return rows


def _batches(workload: Workload, bucketed: bool, batch: int, generator: np.random.Generator) -> list[Batch]:
    """The pool in batches of one task, in random order."""
    batches = []
    for name, pool in workload.pool.items():
        order = generator.permutation(pool)
        if bucketed:
            order = order[np.argsort(workload.data[name].lengths[order], kind="stable")]
        batches += [Batch(name, order[i : i + batch]) for i in range(0, len(order), batch)]
    return [batches[i] for i in generator.permutation(len(batches)).tolist()]


def _cut(workload: Workload, batches: list[Batch]) -> list[list[Batch]]:
    """As many steps as the workload has, of nearly the same tokens."""
    count = len(workload.steps)
    sizes = np.array([workload.data[batch.task].lengths[batch.examples].sum() for batch in batches])
    middles = np.cumsum(sizes) - sizes / 2
    places = (middles * count / sizes.sum()).astype(int).tolist()
    steps: list[list[Batch]] = [[] for _ in range(count)]
    for batch, place in zip(batches, places, strict=True):
        steps[place].append(batch)
    if not all(steps):
        raise ValueError(f"{len(batches)} batches do not fill {count} steps: take more tokens a step")
    return steps

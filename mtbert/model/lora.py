"""LoRA (Hu et al. 2021): a frozen weight W gets a trained low-rank update, W + (alpha / rank) B A.

`add_lora` freezes the encoder and puts adapters on the chosen projections of the chosen layers; `merge`
folds them into the weights and `unmerge` takes them out again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from mtbert.errors import ConfigError
from mtbert.model.dropout import check_probability
from mtbert.model.layer_groups import LayerGroup, layer_numbers

if TYPE_CHECKING:
    from mtbert.model.bert import BertEncoder

ProjectionName = Literal["query", "key", "value", "attention_output", "intermediate", "output"]

PROJECTIONS: tuple[str, ...] = get_args(ProjectionName)
MAX_RANK = 4096  # no width of BERT is above it, and beyond the width a rank adds nothing


@dataclass(frozen=True)
class LoraConfig:
    """Which weights get an adapter, and what kind."""

    rank: int = 8
    """Rows of A and columns of B."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    projections: list[ProjectionName] = field(default_factory=lambda: ["query", "value"])
    """Any of query, key, value, attention_output, intermediate, output."""
    layers: LayerGroup | list[int] = "all"
    """all, first4, last4, mid4 (the four in the middle: layers 1 to 4 of six, 4 to 7 of twelve) or a list of
    layer numbers from 0."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank), which keeps the size of the update at high ranks (rsLoRA, Kalajdzievski 2023)."""
    per_task: bool = False
    """Every task has adapters of its own, used on its sentences alone. They cannot be merged into the weights."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"lora.rank: expected 1 to {MAX_RANK}, found {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(f"lora.alpha: expected a number above 0, found {self.alpha}")
        check_probability("lora.dropout", self.dropout)
        possible = ", ".join(PROJECTIONS)
        if not self.projections:
            raise ConfigError(f"lora.projections: the list is empty; possible: {possible}")
        for name in self.projections:
            if name not in PROJECTIONS:
                raise ConfigError(f"lora.projections: unknown projection {name!r}; possible: {possible}")
        if len(set(self.projections)) != len(self.projections):
            raise ConfigError(f"lora.projections: a projection is named twice in {self.projections}")

    @property
    def scale(self) -> float:
        """What the update is scaled by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def layer_numbers(self, count: int) -> list[int]:
        """The numbers of the adapted layers, ascending, for an encoder of `count` layers."""
        return layer_numbers("model.lora.layers", self.layers, count)


class LoraAdapter(nn.Module):
    """The update scale B A of one weight: `lora_a` [rank, inputs], `lora_b` [outputs, rank]."""

    def __init__(
        self, inputs: int, outputs: int, config: LoraConfig, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.scale = config.scale
        self.dropout = config.dropout
        self.merged = False
        # B is zero, so that training starts at the pretrained model; A as the paper's code draws it.
        self.lora_a = nn.Parameter(torch.empty(config.rank, inputs))
        self.lora_b = nn.Parameter(torch.zeros(outputs, config.rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5), generator=generator)

    def delta(self) -> Tensor:
        """The update of the weight, [outputs, inputs]."""
        return self.scale * (self.lora_b @ self.lora_a)


def add_lora(
    encoder: BertEncoder,
    config: LoraConfig,
    generator: torch.Generator | None = None,
    *,
    tasks: Sequence[str] = (),
) -> None:
    """Freeze `encoder` and put adapters on it. `generator` (on the CPU) draws the A matrices.

    tasks: who gets adapters of its own where the configuration says `per_task`. The encoder computes the same as before
    until the adapters are trained.
    """
    if encoder.has_lora:
        raise ValueError("the encoder has LoRA adapters already")
    if config.per_task and not tasks:
        raise ValueError("lora.per_task: no tasks are named")
    numbers = config.layer_numbers(len(encoder.layers))
    encoder.requires_grad_(False)
    owners: Sequence[str | None] = tasks if config.per_task else (None,)
    for task in owners:
        for number in numbers:
            for name in PROJECTIONS:
                if name in config.projections:
                    encoder.layers[number].add_adapter(name, config, generator, task)


def merge(encoder: BertEncoder) -> None:
    """Fold the adapters into the weights, for prediction at the speed of the plain model.

    While merged, the encoder refuses `state_dict`: its weights are not the frozen ones.
    """
    _fold(encoder, merged=True)


def unmerge(encoder: BertEncoder) -> None:
    """Undo `merge`: the weights are the frozen ones again, up to rounding in their dtype."""
    _fold(encoder, merged=False)


def adapted_weights(encoder: BertEncoder, task: str | None = None) -> Iterator[tuple[Tensor, LoraAdapter]]:
    """Every adapter that all tasks use, with the weight that it updates (for query, key, value their part of
    the fused weight). task: those that this task alone uses, too."""
    for layer in encoder.layers:
        yield from ((weight, adapter) for _, weight, adapter in layer.adapted_weights(task))


@torch.no_grad()
def _fold(encoder: BertEncoder, *, merged: bool) -> None:
    if not encoder.has_lora:
        raise ValueError("the encoder has no LoRA adapters")
    if encoder.has_task_adapters:
        raise ValueError(
            "lora.per_task: adapters of one task each cannot be merged into weights that all tasks share"
        )
    for weight, adapter in adapted_weights(encoder):
        if adapter.merged != merged:
            weight.add_(adapter.delta(), alpha=1 if merged else -1)
            adapter.merged = merged

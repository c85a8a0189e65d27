"""One encoder and a head for every task: one packed pass serves them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from mtbert.errors import ConfigError
from mtbert.kernels.segments import Segments
from mtbert.model.bert import BertEncoder
from mtbert.model.context import LayersBelow, TaskBatch, TaskSegment
from mtbert.model.dropout import DropoutStream
from mtbert.model.first_tokens import first_tokens
from mtbert.model.heads import Head, HeadConfig, HeadSpec
from mtbert.model.layer_groups import layer_of
from mtbert.model.pooling import FIRST_TOKEN_POOLINGS, POOLINGS, Pooling, part, pool

__all__ = [
    "MODES",
    "MODE_ALIASES",
    "MultiTaskModel",
    "ParameterCount",
    "TaskBatch",
    "TaskSegment",
    "build_heads",
]

Mode = Literal["full", "last-linear-layer", "lora", "bitfit"]

MODES: tuple[str, ...] = get_args(Mode)
MODE_ALIASES = {"finetune": "full", "full-model": "full", "pretrain": "last-linear-layer"}
"""The CS224N course's names of the modes."""

_ADDED = ("lora", "extra hidden", "pals", "uncertainty")
"""Parts without a pretrained state: where the model has them, they train with whatever else does."""


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers a part of the model has, and how many of them are trained."""

    part: str
    trainable: int
    total: int


def build_heads(
    specs: Sequence[HeadSpec],
    configs: Mapping[str, HeadConfig],
    width: int,
    generator: torch.Generator | None = None,
) -> dict[str, Head]:
    """A head for every task, drawn one after another from `generator`. width: the encoder's hidden size."""
    return {
        spec.name: Head(spec, configs[spec.name], width, index=index, generator=generator)
        for index, spec in enumerate(specs)
    }


class MultiTaskModel(nn.Module):
    """The encoder and the heads; starts in mode `lora` when the encoder has adapters, else in mode `full`."""

    def __init__(
        self,
        encoder: BertEncoder,
        heads: Mapping[str, Head],
        *,
        trained_layers: int | None = None,
        frozen_dropout: bool = True,
    ) -> None:
        """trained_layers: modes full and bitfit train so many layers from the top and leave what is below them.

        frozen_dropout: whether frozen layers below all trained ones drop as others do; so for the embeddings there.
        """
        super().__init__()
        self.trained_layers = trained_layers
        self.frozen_dropout = frozen_dropout
        self.encoder = encoder
        self.heads: nn.ModuleDict = nn.ModuleDict(heads)
        self.uncertainty: nn.Module | None = None
        """Learned weights of the task losses, where a run has them: kept here so that a checkpoint holds them."""
        self.poolings: dict[str, Pooling] = {task: head.config.pooling for task, head in heads.items()}
        """How the rows of each stream that training reads are pooled."""
        self.probe_poolings: dict[str, Pooling] = {}
        """The same for streams that evaluations alone read: they decide nothing about what is trained or shared."""
        self.mode: Mode = "full"
        self.set_mode("lora" if encoder.has_lora else "full")

    def add_stream(self, name: str, pooling: Pooling) -> None:
        """Serve rows without a head to a loss: stream `name`, which is `{task}/{whose rows they are}`."""
        self._check_stream(name, pooling)
        self.poolings[name] = pooling
        self.set_mode(self.mode)  # it may be the first to need the pooler

    def add_probe(self, name: str, pooling: Pooling) -> None:
        """Serve rows without a head to evaluations alone: what is trained stays as it is."""
        self._check_stream(name, pooling)
        self.probe_poolings[name] = pooling

    def _check_stream(self, name: str, pooling: Pooling) -> None:
        if name in self.poolings or name in self.probe_poolings:
            raise ValueError(f"there is a stream {name!r} already")
        if pooling not in POOLINGS:
            raise ValueError(f"stream {name!r}: unknown pooling {pooling!r}; possible: {', '.join(POOLINGS)}")

    def forward(
        self,
        batch: TaskBatch,
        *,
        dtype: torch.dtype,
        dropout: DropoutStream | None = None,
        segments: Segments | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Outputs [n, outputs] of every task in `batch`, float32 (float64 where the parameters are).

        The arguments are those of `features`.
        """
        return self.outputs_from_features(
            self.features(batch, dtype=dtype, dropout=dropout, segments=segments, noise=noise),
            dropout_rows=self.dropout_rows(batch) if dropout is not None else None,
            dropout=dropout,
        )

    def features(
        self,
        batch: TaskBatch,
        *,
        dtype: torch.dtype,
        dropout: DropoutStream | None = None,
        segments: Segments | None = None,
        noise: Tensor | None = None,
        below: LayersBelow | None = None,
    ) -> dict[str, Tensor]:
        """Pooled rows [rows, C] of every stream in `batch`, float32 (float64 where dtype is).

        dtype: what the encoder computes in. Without a dropout stream nothing is dropped; in mode `last-linear-layer`
        the frozen encoder drops nothing anyway, so that its features can be computed once. segments: groups of tokens
        (each of whole segments of the batch) whose gradients are wanted apart. noise: [T, C], added to the
        embeddings' output. below: what the encoder's first layers give, where that is known.
        """
        if self.mode == "last-linear-layer":
            dropout = None
        streams = [segment.stream for segment in batch.segments]
        if len(set(streams)) < len(streams):
            raise ValueError(f"a stream has two segments in one batch: {streams}")
        poolings = self.poolings | self.probe_poolings
        pooled: dict[str, Tensor] = {}
        for context, hidden in self.encoder.parts(
            batch,
            self.first_token_streams(batch),
            dtype=dtype,
            dropout=dropout,
            segments=segments,
            noise=noise,
            below=below,
        ):
            tokens = cast(TaskBatch, context.batch)
            for pooling in POOLINGS:
                chosen = [segment for segment in tokens.segments if poolings[segment.stream] == pooling]
                if not chosen:
                    continue
                rows = pool(pooling, self.encoder, hidden, tokens, chosen, context.segments)
                sizes = [len(segment.rows) for segment in chosen]
                pooled.update(zip((segment.stream for segment in chosen), rows.split(sizes), strict=True))
        return pooled

    def first_token_streams(self, batch: TaskBatch) -> set[str]:
        """The streams of `batch` whose rows are pooled by their first token: the last layer computes nothing else."""
        poolings = self.poolings | self.probe_poolings
        streams = (segment.stream for segment in batch.segments)
        return {stream for stream in streams if poolings[stream] in FIRST_TOKEN_POOLINGS}

    def outputs_from_features(
        self,
        features: Mapping[str, Tensor],
        *,
        dropout_rows: Mapping[str, Tensor] | None = None,
        dropout: DropoutStream | None = None,
    ) -> dict[str, Tensor]:
        """Outputs [n, outputs] of every task from its pooled rows (see `features`); other streams are left out.

        dropout_rows: int32 [rows] a task (see `dropout_rows`), needed with `dropout`.
        """
        return {
            task: self.head(task)(rows, dropout_rows[task] if dropout_rows is not None else None, dropout)
            for task, rows in features.items()
            if task in self.heads
        }

    def dropout_rows(self, batch: TaskBatch) -> dict[str, Tensor]:
        """The `dropout_row` of each row's first token, int32 [rows] a stream."""
        rows = batch.dropout_row.index_select(0, first_tokens(batch))
        return {segment.stream: part(rows, segment.rows) for segment in batch.segments}

    def head(self, task: str) -> Head:
        """The head of that task."""
        head = self.heads[task]
        assert isinstance(head, Head)
        return head

    def set_mode(self, mode: str) -> None:
        """Choose what is trained; everything else is frozen.

        full: all that gets a gradient (the pooler only when something pools through it); last-linear-layer: the heads;
        lora: the adapters and the heads; bitfit: the heads and the biases of the encoder (Ben Zaken et al. 2022). With
        `trained_layers`, full and bitfit leave the layers below those, and the embeddings, as they are. Extra
        hidden layers and projected attention layers train with every mode but last-linear-layer. The course's names in
        MODE_ALIASES are accepted.
        """
        chosen = MODE_ALIASES.get(mode, mode)
        if chosen not in MODES:
            raise ConfigError(f"mode: unknown mode {mode!r}; possible: {', '.join((*MODES, *MODE_ALIASES))}")
        if (chosen == "lora") != self.encoder.has_lora and chosen != "last-linear-layer":
            found = "has" if self.encoder.has_lora else "has no"
            raise ConfigError(f"mode: {chosen} does not fit an encoder that {found} LoRA adapters")
        trained = {name: self._is_trained(name, chosen) for name, _ in self.named_parameters()}
        if not any(trained.values()):
            raise ConfigError(f"mode: {chosen} leaves nothing to train: the heads have no parameters")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained[name])
        self.encoder.undropped_layers = 0 if self.frozen_dropout else self.encoder.lowest_trained_layer
        self.mode = chosen  # type: ignore[assignment]

    def _is_trained(self, name: str, mode: str) -> bool:
        place = _part_of(name)
        if place.startswith("head ") or mode == "last-linear-layer":
            return place.startswith("head ") or place == "uncertainty"
        if place in _ADDED:
            return True
        if place == "pooler" and not self._pooler_tasks():
            return False
        layer = layer_of(name)
        kept = 0 if self.trained_layers is None else len(self.encoder.layers) - self.trained_layers + 1
        if layer is not None and layer < kept:
            return False
        return mode == "full" or (mode == "bitfit" and name.endswith("bias"))

    def _pooler_tasks(self) -> set[str]:
        """The tasks that train through BERT's pooler, by their head or by another stream of theirs."""
        return {name.partition("/")[0] for name, pooling in self.poolings.items() if pooling == "pooler"}

    def shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The trainable parameters that get gradients from at least two tasks, with their names."""
        if len(self.heads) < 2:
            return []
        own = {parameter for parameter, _ in self.task_parameters()}
        return [
            (name, parameter)
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and name.startswith("encoder.") and parameter not in own
        ]

    def task_parameters(self) -> Iterator[tuple[nn.Parameter, str]]:
        """The trainable parameters that one task alone has, with that task: its head, adapters and layers of its own.

        The pooler is among them where only one task pools through it.
        """
        poolers = self._pooler_tasks()
        for name, parameter in self.named_parameters():
            task = _owner_of(name)
            if task is None and _part_of(name) == "pooler" and len(poolers) == 1:
                task = next(iter(poolers))
            if task is not None and parameter.requires_grad:
                yield parameter, task

    def parameter_counts(self) -> list[ParameterCount]:
        """Trainable and total parameters of embeddings, layers, pooler, each head and what was added, then
        their sum."""
        trainable: dict[str, int] = {}
        total: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            place = _part_of(name)
            total[place] = total.get(place, 0) + parameter.numel()
            trainable[place] = trainable.get(place, 0) + parameter.numel() * parameter.requires_grad
        counts = [ParameterCount(place, trainable[place], total[place]) for place in total]
        return [*counts, ParameterCount("total", sum(trainable.values()), sum(total.values()))]


def _part_of(name: str) -> str:
    """The part of the model that a parameter belongs to."""
    if ".lora_" in name:
        return "lora"
    if ".extra_hidden." in name:
        return "extra hidden"
    owner, place = name.split(".")[:2]
    return {"heads": f"head {place}", "uncertainty": "uncertainty"}.get(owner, place)


def _owner_of(name: str) -> str | None:
    """The only task that uses a parameter, by the parameter's name."""
    parts = name.split(".")
    if parts[0] == "heads":
        return parts[1]
    for marker in ("task_adapters", "tasks"):  # of LoRA and of projected attention layers
        if marker in parts:
            return parts[parts.index(marker) + 1]
    return None

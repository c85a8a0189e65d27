"""One encoder and a head for every task: one packed pass serves them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from mtbert.errors import ConfigError
from mtbert.model.bert import BertEncoder, PackedTokens
from mtbert.model.dropout import DropoutStream
from mtbert.model.heads import Head, HeadConfig, HeadSpec

Mode = Literal["full", "last-linear-layer", "lora"]

MODES: tuple[str, ...] = get_args(Mode)
MODE_ALIASES = {"finetune": "full", "full-model": "full", "pretrain": "last-linear-layer"}
"""The CS224N course's names of the modes."""


class TaskSegment(Protocol):
    """The part of a packed batch that belongs to one task."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def rows(self) -> range:
        """Its rows."""

    @property
    def tokens(self) -> range:
        """The tokens of its rows."""


class TaskBatch(PackedTokens, Protocol):
    """What the model reads of a packed batch."""

    @property
    def segments(self) -> Sequence[TaskSegment]:
        """One a task, in the order of their rows."""


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

    def __init__(self, encoder: BertEncoder, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads: nn.ModuleDict = nn.ModuleDict(heads)
        self.mode: Mode = "full"
        self.set_mode("lora" if encoder.has_lora else "full")

    def forward(
        self, batch: TaskBatch, *, dtype: torch.dtype, dropout: DropoutStream | None = None
    ) -> dict[str, Tensor]:
        """Outputs [n, outputs] of every task in `batch`, float32 (float64 where the parameters are).

        dtype: what the encoder computes in. Without a dropout stream nothing is dropped.
        """
        rows = batch.dropout_row.index_select(0, first_tokens(batch))
        return self.outputs_from_features(
            self.features(batch, dtype=dtype, dropout=dropout),
            dropout_rows={segment.task: _part(rows, segment.rows) for segment in batch.segments},
            dropout=dropout,
        )

    def features(
        self, batch: TaskBatch, *, dtype: torch.dtype, dropout: DropoutStream | None = None
    ) -> dict[str, Tensor]:
        """Pooled rows [rows, C] of every task in `batch`, float32 (float64 where dtype is).

        In mode `last-linear-layer` the frozen encoder drops nothing, so that its features can be computed
        once.
        """
        if self.mode == "last-linear-layer":
            dropout = None
        hidden = self.encoder(batch, dtype=dtype, dropout=dropout)
        pooled: dict[str, Tensor] = {}
        for pooling, pool in _POOLS.items():
            segments = [s for s in batch.segments if self.head(s.task).config.pooling == pooling]
            if not segments:
                continue
            rows = pool(self.encoder, hidden, batch, segments)
            sizes = [len(segment.rows) for segment in segments]
            pooled.update(zip((s.task for s in segments), rows.split(sizes), strict=True))
        if len(pooled) != len(batch.segments):
            raise ValueError(f"a task has two segments in one batch: {[s.task for s in batch.segments]}")
        return pooled

    def outputs_from_features(
        self,
        features: Mapping[str, Tensor],
        *,
        dropout_rows: Mapping[str, Tensor] | None = None,
        dropout: DropoutStream | None = None,
    ) -> dict[str, Tensor]:
        """Outputs [n, outputs] of every task from its pooled rows (see `features`).

        dropout_rows: int32 [rows] a task, the `dropout_row` of each row's first token; needed with `dropout`.
        """
        outputs = {}
        for task, rows in features.items():
            dropout_row = dropout_rows[task] if dropout_rows is not None else None
            outputs[task] = self.head(task)(rows, dropout_row, dropout)
        return outputs

    def head(self, task: str) -> Head:
        """The head of that task."""
        head = self.heads[task]
        assert isinstance(head, Head)
        return head

    def set_mode(self, mode: str) -> None:
        """Choose what is trained; everything else is frozen.

        full: all that gets a gradient (the pooler only when a head pools through it); last-linear-layer:
        the heads; lora: the adapters and the heads. The course's names in MODE_ALIASES are accepted.
        """
        chosen = MODE_ALIASES.get(mode, mode)
        if chosen not in MODES:
            raise ConfigError(f"mode: unknown mode {mode!r}; possible: {', '.join((*MODES, *MODE_ALIASES))}")
        if (chosen == "lora") != self.encoder.has_lora and chosen != "last-linear-layer":
            found = "has" if self.encoder.has_lora else "has no"
            raise ConfigError(f"mode: {chosen} does not fit an encoder that {found} LoRA adapters")
        uses_pooler = any(self.head(task).config.pooling == "pooler" for task in self.heads)

        def is_trained(part: str) -> bool:
            if part.startswith("head "):
                return True
            if part == "lora":
                return chosen == "lora"
            return chosen == "full" and (part != "pooler" or uses_pooler)

        trained = {name: is_trained(_part_of(name)) for name, _ in self.named_parameters()}
        if not any(trained.values()):
            raise ConfigError(f"mode: {chosen} leaves nothing to train: the heads have no parameters")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained[name])
        self.mode = chosen  # type: ignore[assignment]

    def parameter_counts(self) -> list[ParameterCount]:
        """Trainable and total parameters of embeddings, layers, pooler, lora and each head, then their
        sum."""
        trainable: dict[str, int] = {}
        total: dict[str, int] = {}
        for name, parameter in self.named_parameters():
            part = _part_of(name)
            total[part] = total.get(part, 0) + parameter.numel()
            trainable[part] = trainable.get(part, 0) + parameter.numel() * parameter.requires_grad
        counts = [ParameterCount(part, trainable[part], total[part]) for part in total]
        return [*counts, ParameterCount("total", sum(trainable.values()), sum(total.values()))]


def _part_of(name: str) -> str:
    if ".lora_" in name:
        return "lora"
    owner, part = name.split(".")[:2]
    return f"head {part}" if owner == "heads" else part


# ---- pooling: rows of the given segments, in their order ----


def first_tokens(batch: PackedTokens) -> Tensor:
    """Place of each row's first token, int32 [N]. A row without tokens points to some token of the stream."""
    return batch.cu_seqlens[:-1].clamp(max=batch.input_ids.shape[0] - 1)


def _pool_cls(
    encoder: BertEncoder, hidden: Tensor, batch: PackedTokens, segments: Sequence[TaskSegment]
) -> Tensor:
    return _widen(_first_rows(hidden, batch, segments))


def _pool_pooler(
    encoder: BertEncoder, hidden: Tensor, batch: PackedTokens, segments: Sequence[TaskSegment]
) -> Tensor:
    return _widen(encoder.pool_first(_first_rows(hidden, batch, segments)))


def _pool_mean(
    encoder: BertEncoder, hidden: Tensor, batch: PackedTokens, segments: Sequence[TaskSegment]
) -> Tensor:
    lengths = _parts(batch.cu_seqlens.diff(), [segment.rows for segment in segments]).long()
    tokens = _widen(_parts(hidden, [segment.tokens for segment in segments]))
    # Deterministic on every device, unlike index_add; `unsafe` skips a check that would wait for the device.
    sums = torch.segment_reduce(tokens, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums / lengths.clamp(min=1).unsqueeze(1)


_Pool = Callable[[BertEncoder, Tensor, PackedTokens, Sequence[TaskSegment]], Tensor]
_POOLS: dict[str, _Pool] = {"cls": _pool_cls, "pooler": _pool_pooler, "mean": _pool_mean}


def _first_rows(hidden: Tensor, batch: PackedTokens, segments: Sequence[TaskSegment]) -> Tensor:
    return hidden.index_select(0, _parts(first_tokens(batch), [segment.rows for segment in segments]))


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _part(x: Tensor, places: range) -> Tensor:
    return x[places.start : places.stop]


def _parts(x: Tensor, places: Sequence[range]) -> Tensor:
    """The given stretches of x, end to end; x itself (no copy) when they are all of it."""
    joined = [places[0]]
    for stretch in places[1:]:
        if stretch.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, stretch.stop)
        else:
            joined.append(stretch)
    return _part(x, joined[0]) if len(joined) == 1 else torch.cat([_part(x, stretch) for stretch in joined])

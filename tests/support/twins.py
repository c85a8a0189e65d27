"""The reference with the weights, the sentences and the dropout masks of a packed model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from mtbert import reference
from mtbert.kernels.reference import dropout_mask
from mtbert.model.bert import BertEncoder
from mtbert.model.dropout import EMBEDDING, DropoutStream, Place, head_site, layer_site
from mtbert.model.heads import Head, activation
from mtbert.model.lora import LoraConfig
from mtbert.model.multitask import MultiTaskModel
from mtbert.reference import MinBert, MultitaskBert, Rows

Pair = tuple[str, Callable[[], Tensor | None], Callable[[], Tensor | None]]
"""A parameter's name, then how to get it (or its gradient) from the packed model and from the twin."""

MAX_POSITIONS = 4096


# ---- the same network ----


def reference_encoder(encoder: BertEncoder) -> MinBert:
    """A reference BERT of the same sizes and dropout rates, its weights not yet those of `encoder`."""
    names = {field.name for field in fields(reference.BertConfig)}
    sizes = {name: value for name, value in asdict(encoder.config).items() if name in names}
    rates = encoder.dropouts
    return MinBert(
        reference.BertConfig(
            **sizes,
            embedding_dropout=rates.embedding,
            attention_dropout=rates.attention,
            hidden_dropout=rates.hidden,
        )
    ).double()


def reference_head(head: Head, width: int) -> reference.Head:
    config, spec = head.config, head.spec
    return reference.Head(
        spec.name,
        width,
        spec.outputs,
        pooling=config.pooling,
        pair_features=head.features,
        tower_layers=config.tower_layers,
        hidden_layers=config.hidden_layers,
        hidden_size=config.hidden_size,
        activation=None if config.activation == "none" else activation(config.activation),
        dropout=config.dropout,
        score_range=spec.score_range,
    ).double()


def twin_of(model: MultiTaskModel, lora: LoraConfig | None = None) -> MultitaskBert:
    """The reference of a float64 model, in the same mode and with the same weights."""
    bert = reference_encoder(model.encoder)
    if lora is not None:
        numbers = lora.layer_numbers(len(model.encoder.layers))
        reference.add_lora(bert, lora.projections, numbers, lora.rank, lora.alpha, lora.dropout)
    width = model.encoder.config.hidden_size
    heads = {name: reference_head(model.head(name), width) for name in model.heads}
    twin = MultitaskBert(bert, heads, frozen=model.mode == "last-linear-layer")
    with torch.no_grad():
        for name, ours, theirs in parameter_pairs(model, twin):
            target, source = theirs(), ours()
            assert target is not None, name
            assert source is not None, name
            target.copy_(source)
    return twin


def parameter_pairs(model: MultiTaskModel, twin: MultitaskBert, *, gradients: bool = False) -> Iterator[Pair]:
    """Every parameter of the twin beside the (part of the) packed model's parameter that it stands for."""
    yield from encoder_pairs(model.encoder, twin.bert, gradients=gradients)
    for name in model.heads:
        head, other = model.head(name), twin.heads[name]
        layers = [*head.towers, *head.hidden, *([head.output] if head.output is not None else [])]
        others = [*other.towers, *other.hidden, *([other.output] if other.output is not None else [])]
        for depth, (mine, theirs) in enumerate(zip(layers, others, strict=True)):
            yield from _linear(f"heads.{name}.{depth}", mine, theirs.linear, gradients)


def encoder_pairs(encoder: BertEncoder, bert: MinBert, *, gradients: bool = False) -> Iterator[Pair]:
    """As `parameter_pairs`, of the encoder alone."""
    for table in ("word", "position", "token_type"):
        ours, theirs = getattr(encoder.embeddings, table), getattr(bert.embeddings, table).weight
        yield _pair(f"embeddings.{table}", ours, theirs, gradients)
    yield from _linear("embeddings.norm", encoder.embeddings.norm, bert.embeddings.norm, gradients)
    for number, (layer, other) in enumerate(zip(encoder.layers, bert.layers, strict=True)):
        prefix, fused = f"layers.{number}", layer.query_key_value
        for index, part in enumerate(("query", "key", "value")):
            projection = getattr(other.attention, part)
            base = getattr(projection, "linear", projection)
            for kind in ("weight", "bias"):
                name = f"{prefix}.{part}.{kind}"
                yield _pair(name, getattr(fused, kind), getattr(base, kind), gradients, index)
            yield from _adapter(f"{prefix}.{part}", fused.adapter(part), projection, gradients)
        for name in ("attention_output", "intermediate", "output"):
            projection, mine = getattr(other, name), getattr(layer, name)
            yield from _linear(f"{prefix}.{name}", mine, getattr(projection, "linear", projection), gradients)
            yield from _adapter(f"{prefix}.{name}", mine.adapter, projection, gradients)
        for name in ("attention_norm", "output_norm"):
            yield from _linear(f"{prefix}.{name}", getattr(layer, name), getattr(other, name), gradients)
    yield from _linear("pooler", encoder.pooler, bert.pooler, gradients)


def _linear(name: str, ours: nn.Module, theirs: nn.Module, gradients: bool) -> Iterator[Pair]:
    for kind in ("weight", "bias"):
        yield _pair(f"{name}.{kind}", getattr(ours, kind), getattr(theirs, kind), gradients)


def _adapter(name: str, ours: nn.Module | None, theirs: nn.Module, gradients: bool) -> Iterator[Pair]:
    assert (ours is not None) == isinstance(theirs, reference.LoraLinear), name
    if ours is not None:
        for kind in ("lora_a", "lora_b"):
            yield _pair(f"{name}.{kind}", getattr(ours, kind), getattr(theirs, kind), gradients)


def _pair(
    name: str, ours: nn.Parameter, theirs: nn.Parameter, gradients: bool, third: int | None = None
) -> Pair:
    def get(parameter: nn.Parameter, part: int | None) -> Tensor | None:
        value = parameter.grad if gradients else parameter
        return value if value is None or part is None else value.chunk(3)[part]

    return name, lambda: get(ours, third), lambda: get(theirs, None)


# ---- the same masks ----


class StatelessMasks:
    """The packed program's masks for a padded batch of rows with the given row ids."""

    def __init__(self, row_ids: Sequence[int], stream: DropoutStream, head_names: Sequence[str]) -> None:
        self.row_ids = torch.tensor(row_ids)
        self.stream = stream
        self.head_names = list(head_names)

    def __call__(self, place: str, p: float, shape: torch.Size) -> Tensor:
        """The factor of every element, float64 [shape]."""
        dropout = self.stream.at(p, self.site(place))
        assert dropout is not None
        if place.startswith("heads."):  # [B, C]: the row of the first token
            kept = dropout_mask((self.row_ids * MAX_POSITIONS).int(), torch.arange(shape[1]), dropout)
            return kept.double() * dropout.scale
        length = shape[-2]
        rows = (self.row_ids[:, None] * MAX_POSITIONS + torch.arange(length)).int().flatten()
        if place.endswith(".attention"):  # [B, H, L, L]: the query's row, the head's and the key's column
            heads = shape[1]
            columns = (torch.arange(heads)[:, None] * MAX_POSITIONS + torch.arange(length)).flatten()
            kept = dropout_mask(rows, columns, dropout).view(-1, length, heads, length).transpose(1, 2)
        else:  # [B, L, C]
            kept = dropout_mask(rows, torch.arange(shape[2]), dropout).view(shape)
        return kept.double() * dropout.scale

    def site(self, place: str) -> int:
        """The packed program's number for a place that the reference names."""
        if place == "embeddings":
            return EMBEDDING
        owner, name, part = re.fullmatch(r"(layers|heads)\.(\w+)\.(\w+)", place).groups()  # type: ignore[union-attr]
        if owner == "heads":
            return head_site(self.head_names.index(name), int(part))
        return layer_site(int(name), Place[part.upper()])


# ---- the same sentences ----


def padded_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], masks: StatelessMasks | None) -> Rows:
    """Rows of (ids, type ids) as a padded batch."""

    def pad(values: Sequence[Sequence[int]]) -> Tensor:
        tensors = [torch.tensor(list(value), dtype=torch.int64) for value in values]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True)

    ids = pad([ids for ids, _ in rows])
    return Rows(
        ids, pad([types for _, types in rows]), pad([[1] * len(ids) for ids, _ in rows]).bool(), masks
    )

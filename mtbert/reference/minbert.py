"""BERT (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers") on padded batches.

Shapes: B rows (sentences) padded to L tokens, hidden width C, H heads of width D = C / H.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Masks = Callable[[str, float, torch.Size], Tensor]
"""Dropout masks that are given instead of drawn: from a place in the network, its probability p and the
shape to the factor of every element, 0 where it is dropped and 1 / (1 - p) where it is kept."""


@dataclass(frozen=True)
class BertConfig:
    """Sizes of the network and its dropout probabilities."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    hidden_dropout: float = 0.1


@dataclass
class Rows:
    """A padded batch: each row is `[CLS] tokens [SEP]` or `[CLS] first [SEP] second [SEP]`, then padding."""

    input_ids: Tensor
    """[B, L] int64, anything where there is padding."""
    token_type_ids: Tensor
    """[B, L] int64, 1 in the second text of a row."""
    attention_mask: Tensor
    """[B, L] bool, False where there is padding."""
    masks: Masks | None = None
    """Dropout masks for these rows; without them `torch` draws some."""


class Dropout(nn.Module):
    """`nn.Dropout`, but its mask can be given. `place` tells one such module from another."""

    def __init__(self, p: float, place: str) -> None:
        super().__init__()
        self.p, self.place = p, place

    def forward(self, x: Tensor, masks: Masks | None) -> Tensor:
        """Same shape as x; x itself in evaluation."""
        if not self.training or self.p == 0:
            return x
        if masks is None:
            return F.dropout(x, self.p)
        return x * masks(self.place, self.p, x.shape)


class Linear(nn.Linear):
    """`nn.Linear`; it is handed the masks because a LoRA layer in its place drops some of its input."""

    def forward(self, input: Tensor, masks: Masks | None = None) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return super().forward(input)


class Embeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.embedding_dropout, "embeddings")

    def forward(self, rows: Rows) -> Tensor:
        """[B, L, C]."""
        position_ids = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        x = self.word(rows.input_ids) + self.position(position_ids) + self.token_type(rows.token_type_ids)
        return self.dropout(self.norm(x), rows.masks)


class SelfAttention(nn.Module):
    """Scaled dot-product attention with H heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: BertConfig, name: str) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.attention_dropout, f"{name}.attention")

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        query = self.split(self.query(x, rows.masks))
        key = self.split(self.key(x, rows.masks))
        value = self.split(self.value(x, rows.masks))
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_size)  # [B, H, L, L]
        # A large negative score, rather than minus infinity, leaves no NaN in a row that is all padding.
        padding = torch.zeros_like(rows.attention_mask, dtype=x.dtype)
        padding = padding.masked_fill(~rows.attention_mask, torch.finfo(x.dtype).min)
        probabilities = torch.softmax(scores + padding[:, None, None, :], dim=-1)
        probabilities = self.dropout(probabilities, rows.masks)
        return (probabilities @ value).transpose(1, 2).flatten(2)

    def split(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, H, L, D]."""
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)


class Layer(nn.Module):
    """Self-attention, then a feed-forward network; dropout, residual sum and LayerNorm after each."""

    def __init__(self, config: BertConfig, number: int) -> None:
        super().__init__()
        name = f"layers.{number}"
        self.attention = SelfAttention(config, name)
        self.attention_output = Linear(config.hidden_size, config.hidden_size)
        self.attention_dropout = Dropout(config.hidden_dropout, f"{name}.attention_output")
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.gelu = nn.GELU()
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = Dropout(config.hidden_dropout, f"{name}.output")
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        masks = rows.masks
        attended = self.attention_output(self.attention(x, rows), masks)
        x = self.attention_norm(x + self.attention_dropout(attended, masks))
        transformed = self.output(self.gelu(self.intermediate(x, masks)), masks)
        return self.output_norm(x + self.output_dropout(transformed, masks))


class MinBert(nn.Module):
    """Embeddings, layers, and the pooler that BERT trained on its next-sentence task."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, rows: Rows) -> Tensor:
        """Last hidden states [B, L, C]."""
        x = self.embeddings(rows)
        for layer in self.layers:
            x = layer(x, rows)
        return x

    def pool(self, hidden: Tensor, rows: Rows, pooling: str) -> Tensor:
        """One vector a row, [B, C]: of the first token (`cls`), that through the pooler, or the `mean` of
        all tokens."""
        if pooling == "cls":
            return hidden[:, 0]
        if pooling == "pooler":
            return torch.tanh(self.pooler(hidden[:, 0]))
        weight = rows.attention_mask[:, :, None].to(hidden.dtype)
        return (hidden * weight).sum(dim=1) / weight.sum(dim=1)

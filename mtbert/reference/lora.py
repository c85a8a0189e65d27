"""LoRA (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"), equation 3 on a frozen
linear layer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mtbert.reference.minbert import Dropout, Linear, Masks, MinBert


class LoraLinear(nn.Module):
    """W x + b + (alpha / rank) B A dropout(x), of which only A and B are trained."""

    def __init__(self, linear: Linear, rank: int, alpha: float, dropout: float, place: str) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = Dropout(dropout, place)
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, dtype=linear.weight.dtype))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=linear.weight.dtype))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor, masks: Masks | None) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        update = self.dropout(x, masks) @ self.lora_a.T @ self.lora_b.T
        return self.linear(x, masks) + self.scale * update


def add_lora(
    bert: MinBert, projections: Iterable[str], layers: Iterable[int], rank: int, alpha: float, dropout: float
) -> None:
    """Freeze `bert` and replace the named projections of the given layers by LoRA layers.

    projections: of query, key, value, attention_output, intermediate, output.
    """
    bert.requires_grad_(False)
    projections = set(projections)
    for number in layers:
        layer = bert.layers[number]
        for name in sorted(projections):
            in_attention = name in ("query", "key", "value")
            owner = layer.attention if in_attention else layer
            # Query, key and value read the same input, so they share one mask.
            place = f"layers.{number}.lora_{'qkv' if in_attention else name}"
            setattr(owner, name, LoraLinear(getattr(owner, name), rank, alpha, dropout, place))

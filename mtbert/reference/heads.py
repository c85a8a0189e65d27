"""Task heads, and BERT with a head for every task.

A head: layers on each sentence's vector (towers), a feature that joins the two sentences of a pair, more
layers, and a last linear layer. A layer is dropout, a linear map and an activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mtbert.reference.minbert import Dropout, Masks, MinBert, Rows

PAIR_FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda u, v: torch.cat((u, v), dim=-1),
    "difference": lambda u, v: (u - v).abs(),
    "product": lambda u, v: u * v,
    "dot": lambda u, v: (u * v).sum(dim=-1, keepdim=True),
    "cosine": lambda u, v: (
        (u * v).sum(dim=-1, keepdim=True)
        / (u.norm(dim=-1, keepdim=True).clamp(min=1e-8) * v.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    ),
}


class HeadLayer(nn.Module):
    """activation(linear(dropout(x)))."""

    def __init__(
        self, inputs: int, outputs: int, activation: Callable[[Tensor], Tensor] | None, dropout: Dropout
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear = nn.Linear(inputs, outputs)
        self.activation = activation

    def forward(self, x: Tensor, masks: Masks | None) -> Tensor:
        """[n, inputs] -> [n, outputs]."""
        x = self.linear(self.dropout(x, masks))
        return x if self.activation is None else self.activation(x)


class Head(nn.Module):
    """The head of one task. Without `pair_features` each example is one row (a sentence, or a cross-encoded
    pair).

    With `score_range` = (low, high) the output is a score in the label's units, low + (high - low) *
    output; the score of `cosine` alone needs no last layer.
    """

    def __init__(
        self,
        name: str,
        width: int,
        outputs: int,
        *,
        pooling: str = "cls",
        pair_features: Sequence[str] = (),
        tower_layers: int = 0,
        hidden_layers: int = 0,
        hidden_size: int | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.1,
        score_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.pooling, self.pair_features, self.score_range = pooling, tuple(pair_features), score_range
        inner = hidden_size or width
        depth = 0

        def layer(inputs: int, outputs: int, function: Callable[[Tensor], Tensor] | None) -> HeadLayer:
            nonlocal depth
            depth += 1
            p = dropout if inputs > 1 else 0.0  # a single number is not dropped
            return HeadLayer(inputs, outputs, function, Dropout(p, f"heads.{name}.{depth - 1}"))

        self.towers = nn.ModuleList()
        for _ in range(tower_layers):
            self.towers.append(layer(width, inner, activation))
            width = inner
        if self.pair_features:
            widths = {"concat": 2 * width, "difference": width, "product": width, "dot": 1, "cosine": 1}
            width = sum(widths[feature] for feature in self.pair_features)
        self.hidden = nn.ModuleList()
        for _ in range(hidden_layers):
            self.hidden.append(layer(width, inner, activation))
            width = inner
        needs_output = self.pair_features != ("cosine",) or score_range is None
        self.output = layer(width, outputs, None) if needs_output else None

    def forward(
        self, first: Tensor, second: Tensor | None, first_masks: Masks | None, second_masks: Masks | None
    ) -> Tensor:
        """Vectors [n, C] of the first (and the second) row of every example -> outputs [n, outputs]."""
        x = self.tower(first, first_masks)
        if self.pair_features:
            assert second is not None
            y = self.tower(second, second_masks)
            x = torch.cat([PAIR_FEATURES[feature](x, y) for feature in self.pair_features], dim=-1)
        for layer in self.hidden:
            x = layer(x, first_masks)
        if self.output is not None:
            x = self.output(x, first_masks)
        if self.score_range is not None:
            low, high = self.score_range
            x = low + (high - low) * x
        return x

    def tower(self, x: Tensor, masks: Masks | None) -> Tensor:
        """The layers before the pair feature; both sentences go through the same."""
        for layer in self.towers:
            x = layer(x, masks)
        return x


class MultitaskBert(nn.Module):
    """One BERT shared by all tasks, and a head for each. A frozen BERT stays in evaluation: it drops
    nothing."""

    def __init__(self, bert: MinBert, heads: Mapping[str, Head], *, frozen: bool = False) -> None:
        super().__init__()
        self.bert = bert
        self.heads = nn.ModuleDict(heads)
        self.frozen = frozen
        if frozen:
            bert.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> MultitaskBert:
        """Training or evaluation mode, as in torch."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def forward(self, task: str, first: Rows, second: Rows | None = None) -> Tensor:
        """Outputs [n, outputs] of one task for n sentences, pairs of sentences, or cross-encoded pairs."""
        head = self.heads[task]
        assert isinstance(head, Head)
        u = self.bert.pool(self.bert(first), first, head.pooling)
        if second is None:
            return head(u, None, first.masks, None)
        v = self.bert.pool(self.bert(second), second, head.pooling)
        return head(u, v, first.masks, second.masks)

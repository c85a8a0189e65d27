"""A head as `transformers.BertForSequenceClassification` has one: tanh(pooler), then a linear classifier.

The first token's last hidden state h goes through tanh(P h + p) and W x + b. Which heads are that:

- `pooler` pooling and a linear head: as it stands.
- `cls` pooling and one hidden layer with tanh, at most as wide as the encoder: the layer is the pooler (with rows of
  zeros where it is narrower).
- `cls` pooling and a linear head: the pooler is SMALL times the identity, the classifier W / SMALL. tanh(SMALL x) is
  SMALL x up to a share of (SMALL x)^2 / 3, which is below float32's own rounding for |x| < 10, and multiplying by a
  power of two is exact.
- Layers without activation are one linear layer; a similarity's low + (high - low) x is, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtbert.errors import ExportError
from mtbert.model.activations import activation
from mtbert.model.heads import CROSS_ENCODER, Head, HeadConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtbert.tasks.registry import Task

SMALL = 2.0**-14
"""Small enough for float32 (see above), and not so small that float16 would round SMALL x away."""


@dataclass(frozen=True)
class Classifier:
    """The pooler and the classifier, float32."""

    pooler_weight: Tensor
    pooler_bias: Tensor
    weight: Tensor
    bias: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of BertForSequenceClassification."""
        return {
            "bert.pooler.dense.weight": self.pooler_weight,
            "bert.pooler.dense.bias": self.pooler_bias,
            "classifier.weight": self.weight,
            "classifier.bias": self.bias,
        }


def obstacle(task: Task, config: HeadConfig, width: int) -> str | None:
    """What keeps a head from being such a classifier, and what to do; None when nothing does."""
    otherwise = "--format onnx carries every head"
    if task.is_pair and config.pair != CROSS_ENCODER:
        joined = ", ".join(config.pair)
        return (
            f"its head joins two rows ({joined}), but BertForSequenceClassification reads a pair as one"
            f" ({task.name}.head.pair cross-encoder); {otherwise}"
        )
    if config.pooling == "mean":
        return f"head.pooling mean, but BertForSequenceClassification reads the first token; {otherwise}"
    layers = config.tower_layers + config.hidden_layers
    if not layers or config.activation == "none":
        return None
    if activation(config.activation) is not F.tanh:
        return (
            f"a hidden layer with head.activation {config.activation}, but the one of BertForSequenceClassification"
            f" has tanh; {otherwise}"
        )
    if layers > 1 or config.pooling == "pooler":
        found = layers + (config.pooling == "pooler")
        return (
            f"{found} layers with an activation (pooler and hidden), but BertForSequenceClassification has one;"
            f" {otherwise}"
        )
    if (config.hidden_size or width) > width:
        return f"head.hidden_size {config.hidden_size}, but it cannot be above the encoder's width {width}; {otherwise}"
    return None


@torch.no_grad()
def fold(head: Head, task: Task, pooler: nn.Linear, *, two_logits: bool) -> Classifier:
    """The head as pooler and classifier. Raises ExportError where `obstacle` has a reason.

    two_logits: a binary head's logit z becomes the logits (0, z), whose softmax has sigmoid(z) for the second class.
    """
    width = pooler.in_features
    reason = obstacle(task, head.config, width)
    if reason is not None or head.output is None:
        raise ExportError(f"{task.name}: {reason}")
    hidden = [layer for layer in (*head.towers, *head.hidden) if isinstance(layer, nn.Linear)]
    if hidden and head.config.activation != "none":
        [layer] = hidden
        short = width - layer.out_features
        pooler_weight = F.pad(layer.weight.double(), (0, 0, 0, short))
        pooler_bias = F.pad(layer.bias.double(), (0, short))
        weight, bias = F.pad(head.output.weight.double(), (0, short)), head.output.bias.double()
    else:
        weight, bias = _as_one([*hidden, head.output])
        if head.config.pooling == "pooler":
            pooler_weight, pooler_bias = pooler.weight.double(), pooler.bias.double()
        else:
            pooler_weight = SMALL * torch.eye(width, dtype=torch.float64)
            pooler_bias = torch.zeros(width, dtype=torch.float64)
            weight = weight / SMALL
    if head.spec.score_range is not None:
        low, high = head.spec.score_range
        weight, bias = (high - low) * weight, low + (high - low) * bias
    if task.kind == "binary" and two_logits:
        weight, bias = torch.cat((0 * weight, weight)), torch.cat((0 * bias, bias))
    parts = (pooler_weight, pooler_bias, weight, bias)
    if not all(math.isfinite(part.float().abs().max().item()) for part in parts):
        raise ExportError(f"{task.name}: the head's weights are not finite")
    return Classifier(*(part.float() for part in parts))


def _as_one(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Weight and bias (float64) of linear layers that follow each other without an activation."""
    weight = torch.eye(layers[0].in_features, dtype=torch.float64)
    bias = torch.zeros(layers[0].in_features, dtype=torch.float64)
    for layer in layers:
        own = layer.weight.double()
        weight, bias = own @ weight, own @ bias + layer.bias.double()
    return weight, bias

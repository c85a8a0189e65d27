"""Cosines, and the cross-entropy over them that SimCSE and the multiple negatives ranking loss share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SCALE = 1000.0
"""What cosines may be multiplied by: far more overflows float32, and already at this only the best negative counts."""


def unit(x: Tensor) -> Tensor:
    """The rows of `[n, C]` scaled to length 1, at least in float32; a row of zeros stays, without a gradient."""
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.where(norm > 0, torch.inf)


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine `[n]` of the rows of two `[n, C]`; 0 where one of them is zero."""
    return (unit(first) * unit(second)).sum(-1)


def ranking_losses(
    anchors: Tensor,
    candidates: Tensor,
    scale: float,
    groups: Tensor | None = None,
    candidate_groups: Tensor | None = None,
) -> Tensor:
    """Loss `[n]` of finding each anchor's positive among all candidates by cosine.

        -log( e^(scale cos(a_i, c_i)) / sum_j e^(scale cos(a_i, c_j)) )

    anchors: `[n, C]`. candidates: `[m, C]`, m >= n; candidate i is the positive of anchor i, all others are its
    negatives. groups `[n]`, candidate_groups `[m]` int64: candidates of an anchor's own group are left out of its sum,
    except its positive. An anchor without negatives has loss 0.
    """
    logits = scale * (unit(anchors) @ unit(candidates).T)
    targets = torch.arange(len(anchors), device=anchors.device)
    if groups is not None and candidate_groups is not None:
        same = groups[:, None] == candidate_groups[None, :]
        same[targets, targets] = False
        logits = logits.masked_fill(same, -torch.inf)
    return F.cross_entropy(logits, targets, reduction="none")

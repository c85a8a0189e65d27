"""Fused queries, keys and values with adapters beside three LoRA linears, the bare frozen product, and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Goal
from bench.lora.comparisons import (
    BARE,
    EAGER,
    OWN,
    OWN_WIDE,
    PEFT,
    PEFT_WIDE,
    SCALE,
    Inputs,
    Plan,
    bare,
    measured_kernels,
    peft_layers,
)
from mtbert import kernels

THREE = "mtbert, three linears"
PARTS = 3


@dataclass(frozen=True)
class QkvPlan(Plan):
    """One comparison: x [tokens, inputs] through a frozen weight [3 outputs, inputs], an adapter for each third."""

    operation: ClassVar[str] = "lora_qkv"
    blocks: ClassVar[int] = PARTS

    @property
    def name(self) -> str:
        """As the record calls it."""
        return super().name.replace("lora,", "lora qkv,", 1)

    def goals(self) -> list[Goal]:
        """None is set: the ratios are of interest."""
        return [Goal(OWN, to) for to in (BARE, THREE, OWN_WIDE, EAGER, PEFT, PEFT_WIDE)]


def fused(t: Inputs, dtype: torch.dtype | None = None) -> Callable[[], object]:
    """The public operation for all three, with adapters in `dtype`, else in that of x."""
    x, pairs = t.leaf(t.x), t.adapter_leaves(dtype)

    def forward() -> Tensor:
        with measured_kernels(t.plan.device):
            return kernels.lora_qkv(
                x, t.weight, t.bias, tuple(pairs), scale=SCALE, dropout_row=t.rows, dropout=t.dropout
            )

    return t.passes(forward, [x, *(p for pair in pairs for p in pair)])


def three(t: Inputs) -> Callable[[], object]:
    """The public operation for one, three times, each with its third of the weight. Their results stay apart."""
    x, pairs = t.leaf(t.x), t.adapter_leaves()
    parts = list(zip(t.weight.chunk(PARTS), t.bias.chunk(PARTS), pairs, strict=True))

    def forward() -> list[Tensor]:
        with measured_kernels(t.plan.device):
            return [
                kernels.lora_linear(x, w, c, *pair, scale=SCALE, dropout_row=t.rows, dropout=t.dropout)
                for w, c, pair in parts
            ]

    return t.passes(forward, [x, *(p for pair in pairs for p in pair)])


def composed(t: Inputs) -> Callable[[], object]:
    """As the formula reads, one product for the frozen weight."""
    x, pairs = t.leaf(t.x), t.adapter_leaves()

    def forward() -> Tensor:
        added = [F.linear(F.linear(F.dropout(x, t.plan.p), a), b) for a, b in pairs]
        return F.linear(x, t.weight, t.bias) + SCALE * torch.cat(added, 1)

    return t.passes(forward, [x, *(p for pair in pairs for p in pair)])


def peft(t: Inputs, *, wide: bool) -> Callable[[], object]:
    """PEFT's three layers. wide: with adapters in float32, as it makes them from half-width models."""
    layers, leaves = peft_layers(t, wide=wide)
    x = t.leaf(t.x)
    return t.passes(lambda: [layer(x) for layer in layers], [x, *leaves])


BUILDERS: dict[str, Callable[[Inputs], Callable[[], object]]] = {
    OWN: fused,
    OWN_WIDE: lambda t: fused(t, torch.float32),
    THREE: three,
    BARE: bare,
    EAGER: composed,
    PEFT: lambda t: peft(t, wide=False),
    PEFT_WIDE: lambda t: peft(t, wide=True),
}

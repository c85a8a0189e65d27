"""Projected attention layers (Stickland and Murray 2019, "BERT and PALs", sections 3.1 and 3.3).

Beside every layer of the shared encoder stands a small layer TS of each task's own. With h the layer's input and a
its state after attention, the layer's last sum becomes

    LayerNorm(a + FFN(a) + TS(h)),    TS(h) = V_D MH(V_E h).

V_E projects to `size` dimensions and V_D back; a task shares the two over all layers. MH is multi-head self-attention
with queries, keys and values for each layer and without an output projection. V_D starts at zero, so that the
untrained model is plain BERT. All maps have biases, as in the authors' code. Two things in which that code departs
from the formula are not followed: a GELU behind V_D, and 6 heads instead of 12. Nothing is dropped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtbert import kernels
from mtbert.errors import ConfigError
from mtbert.model.context import ForwardContext
from mtbert.model.layer_groups import LayerGroup, layer_numbers

if TYPE_CHECKING:
    from mtbert.model.bert import BertEncoder


MAX_SIZE = 16384


@dataclass(frozen=True)
class PalConfig:
    """Projected attention layers, one set for each task."""

    size: int = 0
    """Their width, a multiple of `heads`; 0: none. The paper has 204 beside a width of 768. On a CPU the fast attention
    takes sizes of 16, 32, 48 ... a head (192 for 12 heads); others are served by plain PyTorch."""
    heads: int = 12
    """Attention heads in them."""
    layers: LayerGroup | list[int] = "all"
    """The encoder layers that get them: all, first4, mid4, last4 or a list of layer numbers from 0."""

    def __post_init__(self) -> None:
        for name, least in (("size", 0), ("heads", 1)):
            if not least <= getattr(self, name) <= MAX_SIZE:
                raise ConfigError(
                    f"model.pals.{name}: expected {least} to {MAX_SIZE}, found {getattr(self, name)}"
                )
        if self.size % self.heads:
            below = self.size // self.heads * self.heads
            near = [str(size) for size in (below, below + self.heads) if size]
            raise ConfigError(
                f"model.pals.size: {self.size} is not a multiple of model.pals.heads {self.heads}; possible: "
                f"{', '.join(near)}"
            )


class TaskPal(nn.Module):
    """The projected attention layers of one task."""

    def __init__(
        self,
        width: int,
        size: int,
        numbers: Sequence[int],
        deviation: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.query_key_value = nn.ModuleDict({str(number): nn.Linear(size, 3 * size) for number in numbers})
        self.up = nn.Linear(size, width)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter)
            if name.endswith("weight") and not name.startswith("up."):
                nn.init.normal_(parameter, 0.0, deviation, generator=generator)

    def attention_input(self, hidden: Tensor, number: int) -> Tensor:
        """[t, C] -> [t, 3 * size], the queries, keys and values of layer `number`."""
        return _linear(self.query_key_value[str(number)], _linear(self.down, hidden))

    def output(self, attended: Tensor) -> Tensor:
        """[t, size] -> [t, C]."""
        return _linear(self.up, attended)


class Pals(nn.Module):
    """The projected attention layers of all tasks. Tokens of other tasks get none."""

    def __init__(
        self,
        width: int,
        layers: int,
        config: PalConfig,
        tasks: Sequence[str],
        *,
        deviation: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.width = width
        self.numbers = layer_numbers("model.pals.layers", config.layers, layers)
        self.tasks = nn.ModuleDict(
            {task: TaskPal(width, config.size, self.numbers, deviation, generator) for task in tasks}
        )

    def forward(self, hidden: Tensor, number: int, context: ForwardContext) -> Tensor | None:
        """TS(h) of layer `number`, [T, C] -> [T, C]; None for a layer without."""
        if number not in self.numbers:
            return None
        batch, heads, size = context.batch, self.config.heads, self.config.size

        def before(task: str, tokens: slice) -> Tensor:
            pal = self.of_task(task)
            part = hidden[tokens]
            return part.new_zeros(len(part), 3 * size) if pal is None else pal.attention_input(part, number)

        def after(task: str, tokens: slice) -> Tensor:
            pal = self.of_task(task)
            part = attended[tokens]
            return part.new_zeros(len(part), self.width) if pal is None else pal.output(part)

        attended = kernels.attention(
            context.by_task(before).view(-1, 3, heads, size // heads),
            batch.cu_seqlens,
            batch.max_seqlen,
            scale=(size // heads) ** -0.5,
        ).flatten(1)
        return context.by_task(after)

    def of_task(self, task: str) -> TaskPal | None:
        """The layers of that task, if it has some."""
        if task not in self.tasks:
            return None
        pal = self.tasks[task]
        assert isinstance(pal, TaskPal)
        return pal


def add_pals(
    encoder: BertEncoder, config: PalConfig, tasks: Sequence[str], generator: torch.Generator | None = None
) -> None:
    """Put projected attention layers beside the layers of `encoder`, which computes the same until they are trained."""
    if not config.size:
        raise ValueError("projected attention layers of size 0")
    sizes = encoder.config
    encoder.pals = Pals(
        sizes.hidden_size,
        len(encoder.layers),
        config,
        tasks,
        deviation=sizes.initializer_range,
        generator=generator,
    ).to(encoder.pooler.weight)


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    # The parameters are one task's own, so that its gradient needs no telling apart from others.
    assert isinstance(module, nn.Linear)
    return kernels.linear(x, module.weight, module.bias)

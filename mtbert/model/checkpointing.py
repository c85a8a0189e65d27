"""Gradient checkpointing (Chen et al. 2016): activations that are computed again in the backward pass.

Dropout masks are functions of place and step, so that a second computation gives the same bits without any state of a
generator. Of the 16 numbers a token and dimension that a layer keeps (its input 1, queries, keys and values 3,
attention 1, its projection 1, the state after attention 1, before and behind the GELU 4 + 4, the last product 1),

    layers      keeps the input, and computes the layer again from it (`torch.utils.checkpoint`);
    selective   keeps 11: all inputs and products, and attention. The state after attention (LayerNorm) and what stands
                behind the GELU are made again from the products when they are asked for.

Attention is kept in mode selective: its probabilities are computed again in the backward pass anyway, so that its
output is 1 of the 16, and making that takes five times as long as making the LayerNorm's: for each number spared,
longer than making a whole layer. With LoRA the input of a frozen projection is not kept in the first place, so that
mode selective spares the state after attention alone.

The last layer is never computed again: its backward pass is the first, and would need everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mtbert.errors import ConfigError

CheckpointingMode = Literal["none", "layers", "selective"]
CHECKPOINTING_MODES: tuple[str, ...] = get_args(CheckpointingMode)


@dataclass(frozen=True)
class CheckpointingConfig:
    """Gradient checkpointing: less memory for activations, the same gradients bit for bit, more time."""

    mode: CheckpointingMode = "none"
    """What is computed again in the backward pass instead of kept. none: nothing; layers: whole encoder layers, from
    their inputs; selective: LayerNorm and GELU, from the matrix products (spares less memory, takes less time)."""
    every: int = 1
    """Of the encoder layers below the last, every k-th: 1 all, 2 the first, third, fifth ..."""

    def __post_init__(self) -> None:
        if self.mode not in CHECKPOINTING_MODES:
            possible = ", ".join(CHECKPOINTING_MODES)
            raise ConfigError(f"checkpointing.mode: found {self.mode!r}; possible: {possible}")
        if self.every < 1:
            raise ConfigError(f"checkpointing.every: expected at least 1, found {self.every}")

    def layer_numbers(self, count: int) -> list[int]:
        """The layers, from 0, that are computed again in an encoder of `count` layers.

        Raises ConfigError where the encoder has fewer layers than the configuration expects.
        """
        if self.mode == "none":
            return []
        if count < 2:
            raise ConfigError(
                f"checkpointing.mode: {self.mode} would have no effect on an encoder of one layer, because the last is"
                " never computed again; possible: none"
            )
        if self.every > count - 1:
            raise ConfigError(
                f"checkpointing.every: found {self.every}, but the encoder has {count - 1} layer(s) below the last;"
                f" possible: 1 to {count - 1}"
            )
        return list(range(0, count - 1, self.every))


def recomputed(call: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """call(x), of which only x is kept for the backward pass; parameters: all that `call` trains."""
    trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    # Operations keep what the parameters that are trained will need, and SMART freezes parameters for the forward pass
    # alone: the second computation must find them as the first did.
    return checkpoint(
        call,
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), _AsItWas(trained)),
    )


class _AsItWas:
    """Within, the parameters are trained or frozen as they were; can be entered for every backward pass of a graph."""

    def __init__(self, trained: Sequence[tuple[nn.Parameter, bool]]) -> None:
        self._trained = trained
        self._changed: list[nn.Parameter] = []

    def __enter__(self) -> None:
        self._changed = [parameter for parameter, was in self._trained if parameter.requires_grad != was]
        self._toggle()

    def __exit__(self, *_: object) -> None:
        self._toggle()

    def _toggle(self) -> None:
        for parameter in self._changed:
            parameter.requires_grad_(not parameter.requires_grad)


class Recipes:
    """Mode selective: operations keep, in place of a cheap result, how to make it again.

    The hooks see every tensor that an operation keeps for its backward pass, whoever implements it (autograd functions
    of C++ and Triton kernels included, of which a policy on dispatched operators sees only the empty outputs). One that
    shares its memory with a result of `cheap` is replaced. What an operation of plain PyTorch keeps inside of itself
    stays.
    """

    def __init__(self) -> None:
        # By the address of their memory. Results live as long as the layer's forward pass, so that no address is given
        # away a second time.
        self._made: dict[int, tuple[Tensor, int, _Recipe]] | None = None

    @contextmanager
    def layer(self) -> Iterator[None]:
        """Within, results of `cheap` are not kept."""
        self._made = {}
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._made = None

    def cheap(self, operation: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
        """operation(*arguments, **options): a new tensor, made again in the backward pass from the same arguments."""
        result = operation(*arguments, **options)
        if self._made is not None and result.requires_grad and result.numel():
            recipe = _Recipe(operation, tuple(map(_constant, arguments)), options)
            self._made[result.untyped_storage().data_ptr()] = (result, result._version, recipe)
        return result

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        made = (self._made or {}).get(tensor.untyped_storage().data_ptr())
        if made is None or made[1] != tensor._version:  # changed since: no recipe leads to it
            return tensor
        recipe = made[2]
        recipe.readers += 1
        return _View(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


class _Recipe:
    """How a tensor is made again: once for all operations that ask for it in a backward pass."""

    def __init__(
        self, operation: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.readers = 0
        self._call = (operation, arguments, options)
        self._result: Tensor | None = None
        self._left = 0

    def read(self) -> Tensor:
        if self._result is None:
            operation, arguments, options = self._call
            with torch.no_grad():
                self._result = operation(*arguments, **options)
            self._left = self.readers
        result = self._result
        self._left -= 1
        if not self._left:
            self._result = None
        return result


@dataclass(frozen=True)
class _View:
    """Where a tensor lies in the memory of what the recipe makes."""

    recipe: _Recipe
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.read().as_strided(kept.shape, kept.strides, kept.offset)


def _constant(argument: Any) -> Any:
    """The argument without the graph that leads to it; a parameter stays itself, as segments know it by identity."""
    if isinstance(argument, Tensor) and not argument.is_leaf:
        return argument.detach()
    return argument

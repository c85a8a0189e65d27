"""Weights in the activations' dtype, cast once for everything that a step or an evaluation does with them.

Master weights are float32, products want bfloat16 or float16. Within the `with` block of a `WeightCasts` the cast of a
parameter is made at its first use and serves all others: the other passes of a step, the passes that objectives add,
what is computed again. The cast is a constant of the graph; the operations send the gradient to the parameter itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor


class _Cast(NamedTuple):
    source: Tensor
    """The parameter, or the part of it: keeping it keeps its memory."""
    version: int
    value: Tensor
    captured: bool
    """Whether a CUDA graph makes it: then it holds nothing but what the graph's replays put there."""


_Key = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


class WeightCasts:
    """Keeps casts: those of `frozen` parameters for good, all others until its `with` block ends.

    A cast is made again where its parameter was changed in place (its version) or was given other memory. But neither
    a fused optimizer nor a replayed CUDA graph gives the parameters that they change a new version, so nothing that is
    trained outlives the block, and no optimizer may step within it. A step that is captured with its block makes its
    casts at every replay.
    """

    def __init__(self, frozen: Iterable[Tensor] = ()) -> None:
        self._frozen = list(frozen)
        self._kept: dict[_Key, _Cast] = {}
        self._before: WeightCasts | None = None

    def __enter__(self) -> WeightCasts:
        global _active
        self._before, _active = _active, self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _active
        _active, self._before = self._before, None
        frozen = {parameter.untyped_storage().data_ptr() for parameter in self._frozen}
        self._kept = {
            key: cast
            for key, cast in self._kept.items()
            # A cast from before a capture stays: the graph reads it where it lies.
            if cast.source.untyped_storage().data_ptr() in frozen and not cast.captured
        }

    def of(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """The parameter in `dtype`, without a gradient."""
        # By its memory: a part of a fused weight is another tensor object in every pass.
        key = (parameter.data_ptr(), parameter.shape, parameter.stride(), dtype)
        found, version = self._kept.get(key), parameter._version
        if found is None or found.version != version:
            # An evaluation's inference tensors could not serve a training step.
            with torch.inference_mode(False), torch.no_grad():
                value = parameter.detach().to(dtype)
            found = self._kept[key] = _Cast(parameter.detach(), version, value, _is_capturing(value))
        return found.value


_active: WeightCasts | None = None


def cast_weight(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The kept cast of a parameter to `dtype`; None where it has that dtype already or nothing keeps casts."""
    if (
        _active is None
        or parameter.dtype == dtype
        or parameter.is_inference()
        or torch.compiler.is_compiling()
    ):
        return None
    return _active.of(parameter, dtype)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

"""What the operations share where they are given segments: parameters apart from the takers of their gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

from torch import Tensor

from .checks import fail
from .segments import Segments


class Split(NamedTuple):
    """The rows and parameters of one call, as its backward pass wants them."""

    groups: list[slice]
    """The rows of each group; slice(None) alone where no parameter has a companion: it names no number of rows, for
    which torch.compile would compile anew."""
    parameters: list[Tensor | None]
    """In the order given, constants where they have a companion."""
    companions: list[Tensor | None]
    """The companion of each parameter, or None."""


def split(
    operation: str,
    segments: Segments | None,
    rows: int,
    parameters: Mapping[str, Tensor | None],
    slotted: str = "",
) -> Split:
    """Check segments against a call's rows and its parameters (by name), and part the parameters from companions.

    A companion has the shape [K, *shape], but [K, any, C] where the segments have slots and its parameter is the one
    named `slotted`. Raises ValueError where it has not, and where the bounds do not end at `rows`.
    """
    values = list(parameters.values())
    if segments is None:
        return Split([slice(None)], values, [None] * len(values))
    if segments.bounds[-1] != rows:
        fail(operation, "segments.bounds", f"ascending from 0 to the {rows} rows", segments.bounds)
    companions = [None if p is None else segments.companions.get(p) for p in values]
    for name, parameter, companion in zip(parameters, values, companions, strict=True):
        if parameter is None or companion is None:
            continue
        expected = [segments.count, *parameter.shape]
        if segments.slots is not None and name == slotted and companion.ndim == 3:
            expected[1] = companion.shape[1]
        if list(companion.shape) != expected:
            argument = f"the companion of {name}"
            fail(operation, argument, f"of shape {expected}", f"shape {list(companion.shape)}")
    if all(companion is None for companion in companions):
        return Split([slice(None)], values, companions)
    constants = [p if p is None or c is None else p.detach() for p, c in zip(values, companions, strict=True)]
    return Split(segments.ranges(), constants, companions)


@overload
def part(tensor: Tensor, rows: slice) -> Tensor: ...
@overload
def part(tensor: Tensor | None, rows: slice) -> Tensor | None: ...
def part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """tensor[rows], without the cost of a view where that is all of it or there is none."""
    if tensor is None or rows.stop is None or tensor.shape[0] == rows.stop - rows.start:
        return tensor
    return tensor[rows]


def row(tensor: Tensor | None, number: int) -> Tensor | None:
    """tensor[number], or None where there is none."""
    return None if tensor is None else tensor[number]


def deliver(
    sums: Sequence[Tensor | None], need_parameters: Sequence[bool], need_companions: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the parameters, followed by those of their companions.

    sums: for each parameter, the part of each group in its gradient, [groups, *shape] (or [1, *shape], the sum of all
    parts, where there is no companion), or None where nothing needs it.
    """
    totals = [
        None if s is None or not need else s[0] if len(s) == 1 else s.sum(0)
        for s, need in zip(sums, need_parameters, strict=True)
    ]
    return totals + [s if need else None for s, need in zip(sums, need_companions, strict=True)]

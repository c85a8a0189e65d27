"""From the events of torch's profiler to the ranges that a breakdown adds up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from mtbert.engine.breakdown import Slice
from mtbert.engine.range_tree import Label

_ACCUMULATE = "torch::autograd::AccumulateGrad"
_ENGINE = "autograd::engine::evaluate_function"
_SUMS = Label("gradient sums", "backward", "gradient sums")
"""What autograd itself adds up: gradients of what is used twice, and those of a parameter over several passes."""
_OTHER = Label("")


def slices_of(events: Iterable[FunctionEvent], labels: Mapping[str, Label]) -> list[Slice]:
    """The ranges among the events of the host, with the device's time of the kernels that they launched.

    labels: the ranges, by name. Kernels that were launched in a thread's no range at all are in slices of no name.
    """
    hosts = [event for event in events if event.device_type == DeviceType.CPU]
    slices: dict[int, Slice] = {}
    for event in hosts:
        label = _SUMS if _is_sum(event) else labels.get(event.name)
        if label is not None:
            slices[id(event)] = _slice(event, label)
    alone: list[Slice] = []
    for event in hosts:
        # An annotation counts among its kernels its own image on the device, which has its name and spans all of them.
        busy = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
        if not busy:
            continue
        owner = _range_above(event, slices)
        if owner is None:
            owner = _slice(event, _OTHER)
            alone.append(owner)
        owner.device += busy
    return [*slices.values(), *alone]


def _slice(event: FunctionEvent, label: Label) -> Slice:
    return Slice(label, event.thread, event.time_range.start, event.time_range.end)


def _is_sum(event: FunctionEvent) -> bool:
    above = event.cpu_parent
    between = (
        event.name in ("aten::add", "aten::add_") and above is not None and above.name.startswith(_ENGINE)
    )
    return between or event.name == _ACCUMULATE


def _range_above(event: FunctionEvent, slices: Mapping[int, Slice]) -> Slice | None:
    at: FunctionEvent | None = event
    while at is not None:
        if id(at) in slices:
            return slices[id(at)]
        at = at.cpu_parent
    return None

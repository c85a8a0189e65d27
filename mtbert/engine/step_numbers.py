"""The numbers of a step's result as one tensor: how they leave a captured graph, and how they come to the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from mtbert.data.packing import Segment
from mtbert.engine.gradients import GradientReport
from mtbert.engine.loss_scale import Scaling
from mtbert.engine.step_result import StepResult
from mtbert.optim.surgery import Combined


def flat(result: StepResult) -> Tensor:
    """All numbers of a result, float64 [n], in memory of their own."""
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in _numbers(result)])


def refilled(form: StepResult, numbers: Tensor, segments: dict[str, Segment] | None = None) -> StepResult:
    """The result whose `flat` is `numbers` [n]; names and shapes are those of `form`.

    Its tensors are views of `numbers`. segments: by stream, in place of those of `form`.
    """
    rest = iter(numbers.split([tensor.numel() for tensor in _numbers(form)]))

    def read(like: Tensor) -> Tensor:
        return next(rest).view(like.shape)

    losses = {task: read(value) for task, value in form.losses.items()}
    objectives = {name: read(value) for name, value in form.objectives.items()}
    total, norm, finite = read(form.total), read(form.grad_norm), read(form.finite).bool()
    examples = tuple(
        (segment if segments is None else segments[segment.stream], read(value))
        for segment, value in form.examples
    )
    gradients = None
    if form.gradients is not None:
        made = form.gradients.combined
        gram = read(form.gradients.gram)
        combined = Combined(read(made.shared), read(made.own), read(made.altered))
        gradients = GradientReport(form.gradients.tasks, gram, combined)
    return replace(
        form,
        losses=losses,
        objectives=objectives,
        total=total,
        grad_norm=norm,
        finite=finite,
        examples=examples,
        gradients=gradients,
        weights={task: read(value) for task, value in form.weights.items()},
        scaling=None
        if form.scaling is None
        else Scaling(read(form.scaling.scale), read(form.scaling.skipped)),
    )


class OnTheWay:
    """A step's result on its way to the host.

    On a GPU one copy is queued right behind the step. Waiting for it is no waiting for the steps that were launched
    after it, as reading the result's own tensors would be: the device always has work.
    """

    def __init__(self, result: StepResult) -> None:
        self._result = result
        self._arrived: torch.cuda.Event | None = None
        if result.total.device.type == "cuda":
            numbers = flat(result)
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def result(self) -> StepResult:
        """The result, on the host, as soon as it is there."""
        if self._arrived is None:
            return self._result
        self._arrived.synchronize()
        return refilled(self._result, self._numbers)


def _numbers(result: StepResult) -> list[Tensor]:
    """The tensors of a result, in the order in which `refilled` reads them."""

    def each() -> Iterator[Tensor]:
        yield from result.losses.values()
        yield from result.objectives.values()
        yield from (result.total, result.grad_norm, result.finite)
        yield from (losses for _, losses in result.examples)
        if result.gradients is not None:
            combined = result.gradients.combined
            yield from (result.gradients.gram, combined.shared, combined.own, combined.altered)
        yield from result.weights.values()
        if result.scaling is not None:
            yield from (result.scaling.scale, result.scaling.skipped)

    return list(each())

"""From the losses of a step's passes to the gradient in `.grad`: summed, or task by task and then combined.

`OnePassGradients` gets the gradients of all tasks from the backward pass that a summed step makes anyway: every
shared parameter has a companion whose gradient holds one slice a task (see `mtbert.kernels.segments`).
`PerTaskGradients` makes one backward pass a task and is the slow twin.

Several ranks add their parts up between the last backward pass and `finish`: what follows is the same on all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from mtbert.data.packing import PackedBatch
from mtbert.engine.distributed import Part
from mtbert.engine.loss_scale import LossScaler
from mtbert.kernels.segments import Segments, companion
from mtbert.model.multitask import MultiTaskModel
from mtbert.optim.mixout import Mixout
from mtbert.optim.surgery import Combined, Surgery, cosines
from mtbert.ranges import span


@dataclass(frozen=True)
class GradientReport:
    """The tasks' gradients over the shared parameters in one step; tensors stay on the device."""

    tasks: tuple[str, ...]
    gram: Tensor
    """[K, K] inner products."""
    combined: Combined

    def to_json(self) -> dict[str, dict[str, float]]:
        """Cosine of each pair, norm of each task, and whether task i's gradient was altered along j's (`i/j`)."""
        pairs = list(combinations(range(len(self.tasks)), 2))
        cosine, norms = cosines(self.gram).tolist(), self.gram.diagonal().clamp(min=0).sqrt().tolist()
        altered = self.combined.altered.tolist()
        name = {
            (i, j): f"{self.tasks[i]}/{self.tasks[j]}" for i in range(len(norms)) for j in range(len(norms))
        }
        return {
            "cosine": {name[i, j]: cosine[i][j] for i, j in pairs},
            "conflict": {name[i, j]: float(cosine[i][j] < 0) for i, j in pairs},
            "norm": dict(zip(self.tasks, norms, strict=True)),
            "altered": {n: float(altered[i][j]) for (i, j), n in name.items() if i != j},
        }


class StepGradients(ABC):
    """Collects the gradient of one step, pass by pass."""

    def __init__(
        self, model: MultiTaskModel, mixout: Mixout | None = None, scaler: LossScaler | None = None
    ) -> None:
        """scaler: what scales the losses; everything after the backward passes sees unscaled gradients."""
        self.model = model
        self.mixout = mixout
        self.scaler = scaler

    def segments(self, batch: PackedBatch) -> Segments | None:
        """Where this batch's task gradients go; None when they are summed."""
        return None

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradients of one pass; losses: 0-d, by task."""
        self._backward(losses if self.scaler is None else self.scaler.scaled(losses))

    def parts(self) -> list[Part]:
        """What this rank has of the step's gradient: as many parts on every rank, in the same order."""
        if self.scaler is not None:
            self.scaler.unscale(self._scaled_gradients())
        return self._parts()

    @abstractmethod
    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        """Add the gradients of the losses, scaled where there is a scaler."""

    @abstractmethod
    def _scaled_gradients(self) -> list[Tensor]:
        """What `_backward` left that is still scaled, each in memory of its own."""

    @abstractmethod
    def _parts(self) -> list[Part]:
        """What this rank has of the step's gradient, without a scale."""

    @abstractmethod
    def finish(self, summed: Sequence[Tensor | None]) -> GradientReport | None:
        """Leave the step's gradient in `.grad`; summed: the parts, summed over the ranks."""

    def _scaled(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The gradient of the weight itself where mixout replaced a part of it."""
        return gradient if self.mixout is None else self.mixout.scale(parameter, gradient)


class SummedGradients(StepGradients):
    """Plain backward of the sum."""

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        _backward_sum(losses)

    def _scaled_gradients(self) -> list[Tensor]:
        return _gradients_of(self.model.parameters())

    def _parts(self) -> list[Part]:
        return [(p.grad, p) for p in self.model.parameters()]

    def finish(self, summed: Sequence[Tensor | None]) -> None:
        """Nothing to combine."""
        for parameter, gradient in zip(self.model.parameters(), summed, strict=True):
            parameter.grad = gradient
        if self.mixout is not None:
            with span("regularisation"):
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad = self._scaled(parameter, parameter.grad)


class TaskGradients(StepGradients):
    """What the two ways to task gradients have in common: the Gram matrix and the combination."""

    def __init__(
        self,
        model: MultiTaskModel,
        surgery: Surgery,
        tasks: Sequence[str],
        mixout: Mixout | None,
        orders: Tensor | None,
        scaler: LossScaler | None = None,
    ) -> None:
        """orders: int64 [K, K - 1] on the host or the device, for each task the others in random order."""
        super().__init__(model, mixout, scaler)
        assert orders is not None
        self.orders = orders.to(next(model.parameters()).device, non_blocking=True)
        self.surgery = surgery
        self.tasks = tuple(tasks)
        self.shared = [p for _, p in model.shared_parameters() if p.requires_grad]
        shared = set(self.shared)
        self.rest = [p for p in model.parameters() if p.requires_grad and p not in shared]
        places = {task: place for place, task in enumerate(self.tasks)}
        self.owners = {p: places[task] for p, task in model.task_parameters() if task in places}

    def _parts(self) -> list[Part]:
        """The tasks' gradients of what they share, then the gradients of all else."""
        return [*self._task_parts(), *((p.grad, p) for p in self.rest)]

    def finish(self, summed: Sequence[Tensor | None]) -> GradientReport | None:
        """Combine the tasks' gradients."""
        with span("surgery"):
            own = summed[len(summed) - len(self.rest) :]
            for parameter, gradient in zip(self.rest, own, strict=True):
                parameter.grad = gradient
            return self._combine(self._task_gradients(summed))

    def _combine(self, gradients: list[tuple[nn.Parameter, Tensor]]) -> GradientReport:
        first = next(self.model.parameters())
        gram = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64, device=first.device)
        for _, gradient in gradients:
            flat = gradient.flatten(1)
            gram += flat @ flat.T
        if self.surgery.config.variant == "reference":
            gram += torch.diag(self._own_norms(gram))
        combined = self.surgery.combine(gram, self.tasks, self.orders)
        for parameter, gradient in gradients:
            weights = combined.shared.to(gradient.dtype)
            self._assign(parameter, torch.tensordot(weights, gradient, 1))
        for parameter in self.rest:
            if parameter.grad is not None:
                parameter.grad = self._scaled(parameter, parameter.grad)
                if parameter in self.owners and self.surgery.config.variant == "reference":
                    parameter.grad *= combined.own[self.owners[parameter]].to(parameter.grad.dtype)
        return GradientReport(self.tasks, gram, combined)

    @abstractmethod
    def _task_parts(self) -> list[Part]:
        """This rank's parts of the gradients of the shared parameters, task by task."""

    @abstractmethod
    def _task_gradients(self, summed: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        """The shared parameters with their gradients [K, *shape]. summed: begins with the sums of `_task_parts`."""

    def _assign(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        parameter.grad = gradient

    def _own_norms(self, like: Tensor) -> Tensor:
        """[K] squared norms of each task's gradient over the parameters that are its own."""
        squares = like.new_zeros(len(self.tasks))
        for parameter, owner in self.owners.items():
            if parameter.grad is not None:
                squares[owner] += parameter.grad.double().square().sum()
        return squares


class OnePassGradients(TaskGradients):
    """The gradients of all tasks from one backward pass."""

    def __init__(
        self,
        model: MultiTaskModel,
        surgery: Surgery,
        tasks: Sequence[str],
        mixout: Mixout | None,
        orders: Tensor | None,
        words: Tensor | None,
        scaler: LossScaler | None = None,
    ) -> None:
        """words: int64, different ones, all that any rank will read in the step: the word table's gradient is kept for
        them alone. None where the table is not trained."""
        super().__init__(model, surgery, tasks, mixout, orders, scaler)
        self.words = model.encoder.embeddings.word
        self.companions: dict[Tensor, Tensor] = {p: companion(p, len(self.tasks)) for p in self.shared}
        device = self.words.device
        self.used: Tensor | None = None
        if self.words in self.companions:
            assert words is not None
            self.used = words.to(device, non_blocking=True)
            self.slot_of = torch.zeros(self.words.shape[0], dtype=torch.int32, device=device)
            self.slot_of[self.used] = torch.arange(len(words), dtype=torch.int32, device=device)
            self.companions[self.words] = companion(self.words[: len(words)].detach(), len(self.tasks))

    def segments(self, batch: PackedBatch) -> Segments | None:
        """The token ranges of the step's tasks in this batch, which holds them in the step's order."""
        sizes = dict.fromkeys(self.tasks, 0)
        for segment in batch.segments:
            sizes[segment.task] += len(segment.tokens)
        bounds = (0, *np.cumsum(list(sizes.values())).tolist())
        slots = None if self.used is None else self.slot_of[batch.input_ids.long()]
        return Segments(bounds, self.companions, slots)

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        _backward_sum(losses)  # companions take the tasks' parts

    def _scaled_gradients(self) -> list[Tensor]:
        return _gradients_of([*self.companions.values(), *self.rest])

    def _task_parts(self) -> list[Part]:
        companions = [self.companions[parameter] for parameter in self.shared]
        return [(each.grad, each) for each in companions]

    def _task_gradients(self, summed: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        return [
            (parameter, self._scaled(parameter, gradient))
            for parameter, gradient in zip(self.shared, summed, strict=False)
            if gradient is not None
        ]

    def _assign(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        if parameter is self.words and self.used is not None:
            parameter.grad = torch.zeros_like(parameter).index_copy_(0, self.used, gradient)
        else:
            parameter.grad = gradient


class PerTaskGradients(TaskGradients):
    """One backward pass a task."""

    def __init__(
        self,
        model: MultiTaskModel,
        surgery: Surgery,
        tasks: Sequence[str],
        mixout: Mixout | None,
        orders: Tensor | None,
        scaler: LossScaler | None = None,
    ) -> None:
        super().__init__(model, surgery, tasks, mixout, orders, scaler)
        self.sums: list[dict[nn.Parameter, Tensor]] = [{} for _ in self.tasks]

    def _backward(self, losses: Mapping[str, Tensor]) -> None:
        for place, task in enumerate(self.tasks):
            if task not in losses or not losses[task].requires_grad:
                continue
            wanted = [*self.shared, *self.rest]
            with span("backward", task):
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    losses[task], wanted, retain_graph=True, allow_unused=True
                )
            if self.scaler is not None:  # at once: what autograd hands out may share memory
                found = self.scaler.unscaled(found)
            for parameter, gradient in zip(self.shared, found, strict=False):
                if gradient is not None:
                    before = self.sums[place].get(parameter)
                    self.sums[place][parameter] = gradient if before is None else before + gradient
            for parameter, gradient in zip(self.rest, found[len(self.shared) :], strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _scaled_gradients(self) -> list[Tensor]:
        return []

    def _task_parts(self) -> list[Part]:
        return [(sums.get(parameter), parameter) for parameter in self.shared for sums in self.sums]

    def _task_gradients(self, summed: Sequence[Tensor | None]) -> list[tuple[nn.Parameter, Tensor]]:
        found = []
        for place, parameter in enumerate(self.shared):
            parts = summed[place * len(self.sums) : (place + 1) * len(self.sums)]
            if any(part is not None for part in parts):
                stacked = torch.stack([torch.zeros_like(parameter) if p is None else p for p in parts])
                found.append((parameter, self._scaled(parameter, stacked)))
        return found


def _gradients_of(leaves: Iterable[Tensor]) -> list[Tensor]:
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def _backward_sum(losses: Mapping[str, Tensor]) -> None:
    trained = [
        loss for loss in losses.values() if loss.requires_grad
    ]  # a cosine over a frozen encoder trains nothing
    if trained:
        torch.stack(trained).sum().backward()

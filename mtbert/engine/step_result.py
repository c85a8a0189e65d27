"""What a step gives back: losses, the gradient's norm, whether all was finite, and who is to blame where it was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtbert.data.packing import Segment
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.gradients import GradientReport
from mtbert.engine.loss_scale import MOST_SKIPPED, Scaling
from mtbert.errors import NonFiniteError


@dataclass(frozen=True)
class StepResult:
    """What a step gives back. Its tensors stay on the device: reading them is the caller's decision."""

    step: int
    """Steps taken before this one."""
    losses: dict[str, Tensor]
    """Mean loss of each task over its rows of the step, 0-d float32, before the task's weight."""
    objectives: dict[str, Tensor]
    """Loss of each objective by `task/objective`, 0-d, with its weight."""
    total: Tensor
    """Weighted sum of all losses, 0-d."""
    grad_norm: Tensor
    """2-norm of the whole gradient before clipping, 0-d."""
    finite: Tensor
    """Whether the loss and the gradient were finite, 0-d bool. When not, the update was skipped on the device."""
    tokens: int
    """Real tokens of the step's examples, those of all ranks."""
    examples: tuple[tuple[Segment, Tensor], ...]
    """Every task's segments of the step with the losses of their examples, for naming culprits: this rank's."""
    gradients: GradientReport | None = None
    """The tasks' gradients, where they were taken one by one."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Learned factor of each task's loss in this step, 0-d, beside its `loss.weight`; empty without uncertainty
    weighting."""
    scaling: Scaling | None = None
    """The loss scale of the step; None where losses are not scaled."""
    world: World = ALONE
    """The ranks that took the step."""

    def check(self) -> bool:
        """Whether the weights were updated: False where the scaled gradients overflowed, as they do now and then.

        Raises NonFiniteError, naming the step, the tasks and the examples, where something was not finite and losses
        are not scaled, or where it was the last of many such steps in a row. All ranks call it together: what was not
        finite was so on all of them.
        """
        if bool(self.finite):
            return True
        if self.scaling is not None and int(self.scaling.skipped) < MOST_SKIPPED:
            return False
        raise NonFiniteError(self._complaint())

    def _complaint(self) -> str:
        where = f"step {self.step + 1}"
        advice = _ADVICE
        if self.scaling is not None:
            where += (
                f", skipped as the {int(self.scaling.skipped) - 1} steps before it, though the loss scale fell to"
                f" {float(self.scaling.scale):g}"
            )
            advice = _FP16_ADVICE
        culprits: dict[str, list[str]] = {}
        everything: dict[str, list[str]] = {}
        for segment, losses in self.examples:
            own = losses[: len(segment.ids)]  # filler has no id
            bad = (~torch.isfinite(own)).nonzero().flatten().tolist()
            culprits.setdefault(segment.task, []).extend(segment.ids[i] for i in bad)
            everything.setdefault(segment.task, []).extend(segment.ids)
        named = {task: ids for task, ids in _joined(self.world.gathered(culprits)).items() if ids}
        everything = _joined(self.world.gathered(everything))
        if named:
            what = "; ".join(f"task {task}: examples {_shorten(ids)}" for task, ids in named.items())
            return f"{where}: the loss is not finite. {what}. {advice}"
        odd = [name for name, loss in self.objectives.items() if not bool(torch.isfinite(loss))]
        if odd:
            return f"{where}: the loss of {', '.join(odd)} is not finite. {advice}"
        what = "; ".join(f"task {task}: examples {_shorten(ids)}" for task, ids in everything.items())
        return (
            f"{where}: every loss is finite, but the gradient is not (norm {float(self.grad_norm)})."
            f" The step held {what}. {advice}"
        )


_ADVICE = "The update was skipped, so the weights are as they were; a lower optim.lr or float32 may help"

_FP16_ADVICE = (
    "The updates were skipped, so the weights are as they were; precision bf16 or float32 or a lower"
    " optim.lr may help"
)


def _joined(parts: Sequence[Mapping[str, Sequence[str]]]) -> dict[str, list[str]]:
    """The lists of all ranks under each name, in the order of the ranks."""
    joined: dict[str, list[str]] = {}
    for part in parts:
        for name, values in part.items():
            joined.setdefault(name, []).extend(values)
    return joined


def _shorten(ids: Sequence[str], most: int = 20) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more

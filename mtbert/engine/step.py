"""One training step: pack, forward, loss, backward, clip, update; and a guard that keeps NaN out of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.packing import Segment, plan_passes
from mtbert.engine.forward import Forward
from mtbert.errors import NonFiniteError
from mtbert.losses.task_losses import TaskLoss
from mtbert.model.dropout import DropoutStream


@dataclass(frozen=True)
class StepResult:
    """What a step gives back. Its tensors stay on the device: reading them is the caller's decision."""

    step: int
    """Steps taken before this one."""
    losses: dict[str, Tensor]
    """Mean loss of each task over its rows of the step, 0-d float32, before the task's weight."""
    total: Tensor
    """Weighted sum of the losses, 0-d."""
    grad_norm: Tensor
    """2-norm of the whole gradient before clipping, 0-d."""
    finite: Tensor
    """Whether the loss and the gradient were finite, 0-d bool. When not, the update was skipped on the device."""
    tokens: int
    """Real tokens of the step's examples."""
    examples: tuple[tuple[Segment, Tensor], ...]
    """Every segment of the step with the losses of its examples, for naming culprits."""

    def check(self) -> None:
        """Raise NonFiniteError, naming the step, the tasks and the examples, unless all was finite."""
        if bool(self.finite):
            return
        culprits: dict[str, list[str]] = {}
        for segment, losses in self.examples:
            bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
            culprits.setdefault(segment.task, []).extend(segment.ids[i] for i in bad)
        named = {task: ids for task, ids in culprits.items() if ids}
        if named:
            what = "; ".join(f"task {task}: examples {_shorten(ids)}" for task, ids in named.items())
            raise NonFiniteError(f"step {self.step + 1}: the loss is not finite. {what}. {_ADVICE}")
        ids_by_task: dict[str, list[str]] = {}
        for segment, _ in self.examples:
            ids_by_task.setdefault(segment.task, []).extend(segment.ids)
        what = "; ".join(f"task {task}: examples {_shorten(ids)}" for task, ids in ids_by_task.items())
        raise NonFiniteError(
            f"step {self.step + 1}: every loss is finite, but the gradient is not (norm {float(self.grad_norm)})."
            f" The step held {what}. {_ADVICE}"
        )


_ADVICE = "The update was skipped, so the weights are as they were; a lower optim.lr or float32 may help"


def _shorten(ids: Sequence[str], most: int = 20) -> str:
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return ", ".join(ids[:most]) + more


class TrainStep:
    """Runs steps of a plan over any number of passes: the gradient is that of the whole step."""

    def __init__(
        self,
        forward: Forward,
        optimizer: torch.optim.Optimizer,
        losses: Mapping[str, TaskLoss],
        data: Mapping[str, TaskData],
        *,
        max_tokens: int,
        clip_norm: float,
        seed: int,
    ) -> None:
        """`max_tokens` bounds the tokens of one forward and backward pass; larger steps take several passes."""
        self.forward = forward
        self.optimizer = optimizer
        self.losses = dict(losses)
        self.data = dict(data)
        self.max_tokens = max_tokens
        self.clip_norm = clip_norm
        self.seed = seed
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def __call__(self, plan: Plan, step: int) -> StepResult:
        """Train on the examples of `plan`; `step` (0-based) selects the dropout masks."""
        result = self.accumulate(plan, step)
        if self.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, result.grad_norm)
        # torch's fused AdamW leaves parameters and moments alone when found_inf is 1, without a host round trip.
        self.optimizer.found_inf = (~result.finite).to(torch.float32)  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        return result

    def accumulate(self, plan: Plan, step: int) -> StepResult:
        """Forward and backward of every pass; leaves the step's gradient in `.grad`, unclipped."""
        self.optimizer.zero_grad(set_to_none=True)
        dropout = DropoutStream(self.seed, step)
        sums: dict[str, Tensor] = {}
        total: Tensor | None = None
        examples: list[tuple[Segment, Tensor]] = []
        tokens = 0
        for requests in plan_passes(plan, self.data, self.max_tokens):
            batch = self.forward(requests, dropout)
            loss: Tensor | None = None
            for segment in batch.segments:
                task_loss = self.losses[segment.task]
                per_example = task_loss.per_example(batch.outputs[segment.task], segment.labels)
                mean_share = (per_example * segment.weights.to(per_example.dtype)).sum()
                weighted = task_loss.weight * mean_share
                loss = weighted if loss is None else loss + weighted
                share = mean_share.detach()
                sums[segment.task] = share if segment.task not in sums else sums[segment.task] + share
                examples.append((segment, per_example.detach()))
            if loss is None:
                continue
            if loss.requires_grad:  # a cosine over a frozen encoder has nothing to train
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
            tokens += batch.tokens
        if total is None:
            raise ValueError("a step needs at least one example")
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        finite = torch.isfinite(norm) & torch.isfinite(total)
        return StepResult(step, sums, total, norm, finite, tokens, tuple(examples))

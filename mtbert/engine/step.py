"""One training step: pack, forward, losses, backward, clip, update; and a guard that keeps NaN out of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mtbert.curriculum import Plan
from mtbert.data.dataset import TaskData
from mtbert.data.packing import Request, Segment, plan_shares, word_ids
from mtbert.data.padding import Budgets, pad_words, valid_labels
from mtbert.engine.distributed import ALONE, Part, World
from mtbert.engine.forward import NOTHING, Forward, PassInput, TrainingPass
from mtbert.engine.gradients import (
    OnePassGradients,
    PerTaskGradients,
    StepGradients,
    SummedGradients,
)
from mtbert.engine.loss_scale import LossScaler
from mtbert.engine.prepared_step import PreparedStep
from mtbert.engine.step_result import StepResult
from mtbert.kernels.casts import WeightCasts
from mtbert.losses.objective import Objective
from mtbert.losses.task_losses import TaskLoss
from mtbert.model.dropout import DropoutStream
from mtbert.optim.mixout import Mixout
from mtbert.optim.pretrained_decay import PretrainedDecay
from mtbert.optim.surgery import Surgery, UncertaintyWeights
from mtbert.ranges import span

if TYPE_CHECKING:
    from mtbert.engine.graphs import StepGraphs


class TrainStep:
    """Runs steps of a plan over any number of passes and ranks: the gradient is that of the whole step.

    All ranks have the same plan. Each reads its share of every pass, and what they get is added up.
    """

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
        objectives: Sequence[Objective] = (),
        surgery: Surgery | None = None,
        uncertainty: UncertaintyWeights | None = None,
        mixout: Mixout | None = None,
        pretrained_decay: PretrainedDecay | None = None,
        scaler: LossScaler | None = None,
        world: World = ALONE,
    ) -> None:
        """`max_tokens` bounds the tokens of one forward and backward pass of a rank; larger steps take several passes.

        objectives: the model knows their streams. surgery: how the tasks' gradients are combined; None sums them.
        scaler: the loss scale of fp16.
        """
        self.forward = forward
        self.model = forward.model
        self.optimizer = optimizer
        self.losses = dict(losses)
        self.objectives = tuple(objectives)
        self.data = dict(data)
        for objective in self.objectives:
            self.data.update(objective.streams())
        self.max_tokens = max_tokens
        self.clip_norm = clip_norm
        self.seed = seed
        self.surgery = surgery
        self.uncertainty = uncertainty
        self.mixout = mixout
        self.pretrained_decay = pretrained_decay
        self.world = world
        self.scaler = scaler
        self.budgets: Budgets | None = None
        """What steps are padded to; None: they are taken as they come."""
        self.graphs: StepGraphs | None = None
        """Captured steps; None: every step is taken one operation after the other."""
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        one_pass = surgery is not None and surgery.config.gradients == "one-pass"
        self.wants_words = one_pass and any(p is self.model.encoder.embeddings.word for p in self.parameters)
        """Whether the gradients of the word table are wanted task by task, and so the words that a step holds."""
        trained = {id(p) for p in self.parameters}
        self.casts = WeightCasts(p for p in self.model.parameters() if id(p) not in trained)

    def __call__(self, plan: Plan, step: int, progress: float = 0.0) -> StepResult:
        """Train on the examples of `plan`.

        step: 0-based; selects the dropout masks. progress: the share of the training that is done, for what
        follows a schedule.
        """
        with span("data"):
            ready = self.prepare(plan, step)
        return self.run(ready, progress)

    def prepare(self, plan: Plan, step: int) -> PreparedStep:
        """All of a step that is done on the host before the device is needed; another thread may do it.

        A function of its arguments: it reads nothing that training changes, and steps are prepared in their order.
        """
        examples = self._streams(plan, step)
        shares = plan_shares(examples, self.data, self.max_tokens, self.world.size)
        if not shares:
            raise ValueError("a step needs at least one example")
        tasks = tuple(task for task, rows in plan.items() if len(rows))
        orders = None
        if self.surgery is not None and len(tasks) > 1:
            orders = self._ready(self.surgery.orders(len(tasks), step))
        own = [by_rank[self.world.rank] for by_rank in shares]
        if self.budgets is not None and len(own) == 1:
            one = self.forward.prepare(own[0], self.budgets)
            words = self._words(tasks, (one,), shares)
            if one.shape is None or words is None or len(words) <= self.budgets.words:
                if one.shape is not None and words is not None:
                    words = self._ready(pad_words(words, self.budgets.words))
                return PreparedStep(
                    step, tasks, examples, (one,), shares, words, orders, one.shape, one.unfit
                )
            unfit = "more words than their budget"
        else:
            unfit = "" if self.budgets is None else "the step takes several passes (max_tokens)"
        ready = tuple(self.forward.prepare(requests) if requests else PassInput((), 0) for requests in own)
        words = self._words(tasks, ready, shares)
        return PreparedStep(
            step,
            tasks,
            examples,
            ready,
            shares,
            None if words is None else self._ready(words),
            orders,
            unfit=unfit,
        )

    def run(self, ready: PreparedStep, progress: float = 0.0) -> StepResult:
        """Train on what was prepared, by a captured graph where there is one."""
        return self.eager(ready, progress) if self.graphs is None else self.graphs.run(ready, progress)

    def eager(self, ready: PreparedStep, progress: float = 0.0) -> StepResult:
        """Train on what was prepared, one operation after the other."""
        result = self.backward(ready, progress)
        update(self.optimizer, result, self.clip_norm, self.scaler)
        for objective in self.objectives:
            with span("regularisation"):
                objective.after_step()
        return result

    def accumulate(self, plan: Plan, step: int, progress: float = 0.0) -> StepResult:
        """Prepare the step and leave its gradient in `.grad`, unclipped."""
        return self.backward(self.prepare(plan, step), progress)

    def backward(self, ready: PreparedStep, progress: float = 0.0) -> StepResult:
        """Forward and backward of every pass; leaves the step's gradient in `.grad`, unclipped."""
        step = ready.step if ready.counter is None else ready.counter
        with span("optimizer"):
            self.optimizer.zero_grad(set_to_none=True)
        dropout = DropoutStream(self.seed, step)
        sums = _Sums()
        with span("data"):
            gradients = self._gradients(ready)
        with self.mixout.mixed(step) if self.mixout else contextlib.nullcontext(), self.casts:
            for each, shares in zip(ready.passes, ready.shares, strict=True):
                result = self.forward.run(each, dropout, gradients.segments) if each.requests else NOTHING
                run = TrainingPass(
                    self.forward,
                    result,
                    dropout=dropout,
                    segments=gradients.segments,
                    examples=ready.examples,
                    step=ready.step,
                    progress=progress,
                    world=self.world,
                    shares=shares,
                )
                with span("loss"):
                    losses = self._losses(run, sums)
                with span("backward"):
                    gradients.backward(losses)
        parts, figures = gradients.parts(), sums.parts(self._figures(), self.parameters[0])
        summed = self.world.summed([*parts, *figures])
        sums.take(self._figures(), summed[len(parts) :])
        report = gradients.finish(summed[: len(parts)])
        if self.pretrained_decay is not None:
            with span("regularisation"):
                self.pretrained_decay.add_gradients()
        with span("optimizer"):
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in self.parameters if p.grad is not None], foreach=True
            )
        # A step may hold nothing that an objective can use, and then it trains nothing.
        total = torch.stack([torch.zeros_like(norm), *(loss.to(norm) for loss in sums.totals.values())]).sum()
        finite = torch.isfinite(norm) & torch.isfinite(total)
        return StepResult(
            ready.step,
            sums.tasks,
            sums.objectives,
            total,
            norm,
            finite,
            sum(int(self.data[name].lengths[rows].sum()) for name, rows in ready.examples.items()),
            tuple(sums.examples),
            report,
            self._learned_weights(),
            None if self.scaler is None else self.scaler.report(finite),
            self.world,
        )

    def state(self) -> dict[str, Tensor]:
        """What objectives, surgery and the loss scale must find again after a resumption, by name."""
        state = {
            f"objective/{objective.name}/{name}": value
            for objective in self.objectives
            for name, value in objective.state().items()
        }
        if self.surgery is not None:
            state |= {f"surgery/{name}": value for name, value in self.surgery.state().items()}
        if self.scaler is not None:
            state |= {f"loss_scale/{name}": value for name, value in self.scaler.state().items()}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state()`."""
        if self.graphs is not None:
            self.graphs.forget()  # they write to the state that was
        for objective in self.objectives:
            objective.restore(_below(state, f"objective/{objective.name}/"))
        if self.surgery is not None:
            self.surgery.restore(_below(state, "surgery/"))
        if self.scaler is not None:
            self.scaler.restore(_below(state, "loss_scale/"))

    def _streams(self, plan: Plan, step: int) -> Plan:
        """The plan with the objectives' rows beside those of the task that they belong to."""
        added: dict[str, np.ndarray] = {}
        for objective in self.objectives:
            added.update(objective.examples(plan, step))
        streams: Plan = {}
        for task, examples in plan.items():
            streams[task] = examples
            streams.update({name: rows for name, rows in added.items() if self.data[name].task == task})
        return streams

    def _words(
        self, tasks: Sequence[str], passes: Sequence[PassInput], shares: Sequence[Sequence[Sequence[Request]]]
    ) -> Tensor | None:
        """The words that any rank's passes hold, where the gradients of the word table are wanted task by task."""
        if not self.wants_words or len(tasks) < 2:
            return None
        held = [each.batch.input_ids for each in passes if each.batch is not None]
        for by_rank in shares:
            others = (share for rank, share in enumerate(by_rank) if rank != self.world.rank)
            held += [torch.from_numpy(word_ids(request)) for share in others for request in share]
        return torch.cat(held).unique().long()

    def _ready(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.forward.device.type == "cuda" else tensor

    def _figures(self) -> list[_Figure]:
        """All losses that a step can have, in one order on all ranks."""
        names = [f"{task}/{objective.name}" for objective in self.objectives for task in self.losses]
        return [
            *(("tasks", task) for task in self.losses),
            *(("objectives", name) for name in names),
            *(("totals", task) for task in self.losses),
        ]

    def _gradients(self, ready: PreparedStep) -> StepGradients:
        if self.surgery is None or len(ready.tasks) < 2:
            return SummedGradients(self.model, self.mixout, self.scaler)
        if self.surgery.config.gradients == "per-task":
            return PerTaskGradients(
                self.model, self.surgery, ready.tasks, self.mixout, ready.orders, self.scaler
            )
        return OnePassGradients(
            self.model, self.surgery, ready.tasks, self.mixout, ready.orders, ready.words, self.scaler
        )

    def _learned_weights(self) -> dict[str, Tensor]:
        """The learned weights of the tasks whose losses have them."""
        if self.uncertainty is None:
            return {}
        return {task: w for task, w in self.uncertainty.weights().items() if self.losses[task].weight}

    def _losses(self, run: TrainingPass, sums: _Sums) -> dict[str, Tensor]:
        """The weighted loss of each task in one pass: its own and its parts of the objectives."""
        losses: dict[str, Tensor] = {}
        for task, task_loss in self.losses.items():
            segment = run.segment(task)
            if segment is None:
                continue
            with span("loss", task) as opened:
                per_example = task_loss.per_example(run.outputs[task], valid_labels(segment))
                sums.examples.append((segment, per_example.detach()))
                weights = segment.weights.to(per_example.dtype)
                mean_share = (per_example * weights).sum()
                _add(sums.tasks, task, mean_share)
                if task_loss.weight:
                    losses[task] = task_loss.weight * mean_share
                if self.uncertainty is not None and task in losses:
                    losses[task] = self.uncertainty(task, losses[task], weights.sum())
                if task in losses:
                    opened.ends_in(losses[task])
        for objective in self.objectives:
            with span("loss", objective.name) as opened:
                for task, loss in objective.losses(run).items():
                    opened.ends_in(loss)
                    _add(sums.objectives, f"{task}/{objective.name}", loss)
                    losses[task] = losses[task] + loss if task in losses else loss
        for task, loss in losses.items():
            _add(sums.totals, task, loss)
        return losses


def update(
    optimizer: torch.optim.Optimizer, result: StepResult, clip_norm: float, scaler: LossScaler | None = None
) -> None:
    """Clip the gradient to `clip_norm` (0: not) and step, unless the loss or the gradient is not finite.

    scaler: learns which it was. The gradient is unscaled.
    """
    with span("optimizer"):
        if clip_norm > 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, result.grad_norm)
        # torch's fused AdamW leaves parameters and moments alone when found_inf is 1, without a host round trip.
        optimizer.found_inf = (~result.finite).to(torch.float32)  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        if scaler is not None:
            scaler.update(result.finite)


_Figure = tuple[str, str]
"""Names a loss: the attribute of _Sums, and the key."""


class _Sums:
    """What a step's passes add up to."""

    def __init__(self) -> None:
        self.tasks: dict[str, Tensor] = {}
        self.objectives: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.examples: list[tuple[Segment, Tensor]] = []

    def parts(self, figures: Sequence[_Figure], like: Tensor) -> list[Part]:
        """This rank's part of each loss. like: of the dtype and on the device of all of them."""
        empty = like.new_zeros(())
        found = [getattr(self, kind).get(name) for kind, name in figures]
        return [(None if value is None else value.to(like.dtype), empty) for value in found]

    def take(self, figures: Sequence[_Figure], summed: Sequence[Tensor | None]) -> None:
        """Put the sums over the ranks in place of this rank's parts."""
        self.tasks, self.objectives, self.totals = {}, {}, {}
        for (kind, name), value in zip(figures, summed, strict=True):
            if value is not None:
                getattr(self, kind)[name] = value


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

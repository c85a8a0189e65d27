"""Bregman proximal point optimisation with momentum (Jiang et al. 2020, SMART, section 2.2).

    D(theta, teacher) = mean over examples of  l_s(f(x; theta), f(x; teacher))
    after every update:  teacher <- momentum * teacher + (1 - momentum) * theta

The first teacher is the model as training begins. It drops nothing and gets no gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.divergence import (
    OutputDivergence,
    at_least_float32,
    build_divergences,
    has_encoder_dropout,
)
from mtbert.losses.objective import Objective, ObjectiveContext, Pass
from mtbert.model.multitask import MultiTaskModel


@dataclass
class BregmanConfig:
    """Bregman proximal point: outputs must not move fast from those of a slow copy of the model."""

    tasks: list[str] = field(default_factory=list)
    """Tasks that are regularised; none by default."""
    weight: float = 1.0
    """mu: weight beside the tasks' own losses. The paper took 1."""
    momentum: float = 0.99
    """beta: what remains of the copy at every update. The paper took 0.99 for the first tenth of the updates, then
    0.999. With 0 the copy is the model before the update: it holds nothing back but dropout."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(f"bregman.weight: expected a number above 0, found {self.weight}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"bregman.momentum: expected at least 0 and below 1, found {self.momentum}")


class Teacher:
    """The slow copy: its own tensors for what the model trains, the model's own for what is frozen.

    In mode lora it costs the adapters and heads alone. What trains must be known when it is made.
    """

    def __init__(self, model: MultiTaskModel, momentum: float) -> None:
        self.momentum = momentum
        trained = {
            name: p for name, p in model.named_parameters() if p.requires_grad and _gives_outputs(name)
        }
        copied = {id(p) for p in trained.values()}
        shared: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in copied}
        self.model = copy.deepcopy(model, shared)
        own = dict(self.model.named_parameters())
        self._student = list(trained.values())
        self._own = {name: own[name].requires_grad_(False).detach() for name in trained}

    def follow(self) -> None:
        """Move towards the model."""
        student = [p.detach() for p in self._student]
        torch._foreach_lerp_(list(self._own.values()), student, 1 - self.momentum)

    def state(self) -> dict[str, Tensor]:
        """Its own tensors by the parameters' names, in the parameters' dtype (float32)."""
        return dict(self._own)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a state. Raises ValueError when they are those of another model or mode."""
        if state.keys() != self._own.keys():
            odd = sorted(state.keys() ^ self._own.keys())
            raise ValueError(f"the state of bregman's teacher does not fit the model: {', '.join(odd[:5])}")
        for name, tensor in self._own.items():
            tensor.copy_(state[name])


def _gives_outputs(name: str) -> bool:
    return name.startswith(("encoder.", "heads."))


class BregmanObjective(Objective):
    """How far the chosen tasks' outputs are from the teacher's: the mean over the step's examples, times the weight.

    It takes one more forward pass. Where the encoder drops nothing, model and teacher differ by less than bfloat16
    resolves (a lag of 1e-4 in every weight of MiniLM: values 0.8 to 5 times the true one and cosines of the gradient
    below 0.61; with dropout 0.1: within 2% and above 0.998), so a bfloat16 run then computes both anew in float32.
    """

    name = "bregman"

    def __init__(
        self,
        config: BregmanConfig,
        divergences: Mapping[str, OutputDivergence],
        model: MultiTaskModel,
        dtype: torch.dtype,
    ) -> None:
        """dtype: of the run's encoder."""
        self.weight = config.weight
        self.divergences = dict(divergences)
        self.teacher = Teacher(model, config.momentum)
        self.frozen_encoder = model.mode == "last-linear-layer"
        self.dtype = dtype if has_encoder_dropout(model) else at_least_float32(dtype)
        self.anew = self.dtype != dtype and not self.frozen_encoder

    def losses(self, run: Pass) -> Mapping[str, Tensor]:
        """The share of this pass in each task's mean over the step."""
        streams = [s.stream for s in run.segments if s.stream in self.divergences]
        if not streams:
            return {}
        outputs = run.outputs
        if self.anew:
            outputs = run.again(streams, dropout=run.fresh_dropout(), dtype=self.dtype).outputs
        with torch.no_grad():
            targets = self._targets(run, streams)
        losses = {}
        for stream in streams:
            segment = run.segment(stream)
            assert segment is not None
            divergence = self.divergences[stream](outputs[stream], targets[stream])
            losses[stream] = self.weight * (divergence * segment.weights.to(divergence.dtype)).sum()
        return losses

    def _targets(self, run: Pass, streams: Sequence[str]) -> Mapping[str, Tensor]:
        teacher = self.teacher.model
        if self.frozen_encoder:
            return teacher.outputs_from_features({stream: run.rows[stream] for stream in streams})
        return run.again(streams, dropout=None, trained=False, model=teacher, dtype=self.dtype).outputs

    def after_step(self) -> None:
        """The teacher follows the model."""
        self.teacher.follow()

    def state(self) -> dict[str, Tensor]:
        """The teacher's tensors."""
        return self.teacher.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the teacher of `state`."""
        self.teacher.restore(state)


def build_bregman(config: BregmanConfig, context: ObjectiveContext) -> BregmanObjective | None:
    """The objective, or None when no task has it; ConfigError for tasks that the run does not have."""
    if not config.tasks:
        return None
    divergences = build_divergences("bregman", config.tasks, context.tasks)
    return BregmanObjective(config, divergences, context.model, context.dtype)

"""A whole training step captured in a CUDA graph: one launch instead of thousands.

A captured step is a list of kernels with fixed addresses. So whatever differs from step to step is a tensor in a buffer
that stays where it is: the packed batch (padded to a fixed shape, see `mtbert.data.padding`), the words, the step's
number (dropout masks), the orders of gradient surgery, the learning rates. Nothing is read back from the device within
a step, and nothing of a step's own is kept in Python. A step that has no shape is taken one operation after the other.

Every shape is first taken `WARM_UP` times as it will be captured, on the same stream, but without a graph: kernels get
compiled and the optimizer's state comes into being. These are steps of the training like all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mtbert.data.padding import measure_budgets
from mtbert.engine.capture import Captures, CudaRecorder, Recorder, Work
from mtbert.engine.distributed import World
from mtbert.engine.forward import Forward, PackedForward
from mtbert.engine.frozen_prefix import PrefixForward
from mtbert.engine.inference_graphs import InferenceGraphs
from mtbert.engine.prepared_step import PreparedStep
from mtbert.engine.step import TrainStep
from mtbert.engine.step_numbers import flat, refilled
from mtbert.engine.step_result import StepResult
from mtbert.errors import ConfigError
from mtbert.optim.schedule import move_learning_rates

if TYPE_CHECKING:
    from mtbert.config import TrainConfig
    from mtbert.curriculum import Curriculum

Graphs = Literal["never", "auto", "always"]

WARM_UP = 2
MOST = 16
"""Shapes that are captured at most; each holds the memory of a step's small tensors, and shares that of the large."""


class StepGraphs(Captures[PreparedStep, StepResult]):
    """The captured steps of a training, by shape."""

    def __init__(
        self, step: TrainStep, recorder: Recorder, *, most: int = MOST, warm_up: int = WARM_UP
    ) -> None:
        super().__init__(recorder, most=most, warm_up=warm_up)
        self.step = step
        self._trained: tuple[bool, ...] = ()

    def run(self, ready: PreparedStep, progress: float = 0.0) -> StepResult:
        """Train on what was prepared."""
        if ready.shape is None:
            self._refused(ready.unfit)
            return self.step.eager(ready, progress)
        trained = tuple(p.requires_grad for p in self.step.parameters)
        if trained != self._trained:  # gradual unfreezing: the graphs know nothing of the gradients of others
            self.forget()
            self._trained = trained
        result = self._attempt(ready.shape, lambda: _Step(self.step, ready), ready)
        return self.step.eager(ready, progress) if result is None else result


class _Step(Work[PreparedStep, StepResult]):
    """The step of one shape."""

    def __init__(self, step: TrainStep, ready: PreparedStep) -> None:
        super().__init__(f"a step of {', '.join(ready.tasks)}")
        self.step = step
        counted = replace(ready, counter=torch.tensor([ready.step]))
        self.buffers = counted.mapped(lambda tensor: torch.empty_like(tensor, device=step.forward.device))
        self._targets = _tensors(self.buffers)
        self.form: StepResult | None = None
        """What a step gives back; its names and shapes are those of every step of this shape."""

    def load(self, given: PreparedStep) -> None:
        """Put a step's input into the buffers."""
        counted = replace(given, counter=None)
        counter, *targets = reversed(self._targets)
        counter.fill_(given.step)
        for target, source in zip(reversed(targets), _tensors(counted), strict=True):
            target.copy_(source, non_blocking=True)

    def compute(self) -> Tensor:
        """Take the step. One copy of all numbers saves them from the next replay."""
        self.form = self.step.eager(self.buffers)
        return flat(self.form)

    def result(self, flat: Tensor, given: PreparedStep) -> StepResult:
        """The step's result, read from its numbers [n]."""
        assert self.form is not None
        batch = given.passes[0].batch
        assert batch is not None
        found = refilled(self.form, flat, {segment.stream: segment for segment in batch.segments})
        return replace(found, step=given.step, tokens=sum(each.tokens for each in given.passes))


def _tensors(ready: PreparedStep) -> list[Tensor]:
    found: list[Tensor] = []
    ready.mapped(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


# ---- whether a run can have them ----


def inference_obstacles(config: TrainConfig, forward: Forward, world: World) -> list[str]:
    """Why neither a step nor a pass of an evaluation can be captured; empty where passes can."""
    found = {
        f"the device is {forward.device.type}, and CUDA graphs need a GPU": forward.device.type != "cuda",
        f"mode {config.mode} reads cached features": not isinstance(forward, PackedForward),
        "the outputs of frozen layers come from files (frozen_cache)": (
            isinstance(forward, PrefixForward) and forward.serves
        ),
        "several ranks train": world.size > 1,
        f"profile {config.profile} names the operations of a step one by one": config.profile != "none",
    }
    return [reason for reason, is_there in found.items() if is_there]


def step_obstacles(config: TrainConfig, step: TrainStep, curriculum: Curriculum) -> list[str]:
    """Why no step of a run can be captured, even where passes of its evaluations can; empty where some can."""
    found = {
        f"{', '.join(o.name for o in step.objectives)} choose rows on the host": bool(step.objectives),
        f"curriculum.mixing {config.curriculum.mixing} changes the tasks' rows": curriculum.follows_scores,
    }
    return [reason for reason, is_there in found.items() if is_there]


def use_graphs(config: TrainConfig, step: TrainStep, curriculum: Curriculum) -> str:
    """Have the run's steps and evaluations captured as `config.graphs` says; returns what came of it, for the log and
    the record.

    Raises ConfigError, with the reasons, where they are asked for (`always`) and the steps' cannot be had.
    """
    if config.graphs == "never":
        return "off"
    of_both = inference_obstacles(config, step.forward, step.world)
    of_steps = step_obstacles(config, step, curriculum)
    reasons = "; ".join([*of_both, *of_steps])
    if config.graphs == "always" and reasons:
        raise ConfigError(f"graphs: always is not possible: {reasons}; possible: auto, never")
    if of_both:
        return f"off: {reasons}"
    recorder = CudaRecorder(step.forward.device)
    enable_inference(step.forward, recorder)
    if of_steps:
        return f"evaluations only: {reasons}"
    enable(step, curriculum, recorder)
    return "on"


def enable(step: TrainStep, curriculum: Curriculum, recorder: Recorder) -> StepGraphs:
    """Pad the steps to the budgets of the curriculum's batches, and capture them."""
    make_capturable(step.optimizer, step.forward.device)
    words = step.model.encoder.embeddings.word.shape[0] if step.wants_words else 0
    step.budgets = measure_budgets(curriculum.batches, step.data, vocabulary=words)
    step.graphs = StepGraphs(step, recorder)
    return step.graphs


def enable_inference(forward: Forward, recorder: Recorder) -> InferenceGraphs:
    """Capture the passes that `forward` makes without dropout and gradients."""
    assert isinstance(forward, PackedForward)
    forward.graphs = InferenceGraphs(forward, recorder)
    return forward.graphs


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the optimizer read its learning rates from the device, where `set_learning_rate` writes them."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    move_learning_rates(optimizer, device)

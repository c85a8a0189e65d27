"""A whole training step captured in a CUDA graph: one launch instead of thousands.

A captured step is a list of kernels with fixed addresses. So whatever differs from step to step is a tensor in a buffer
that stays where it is: the packed batch (padded to a fixed shape, see `mtbert.data.padding`), the words, the step's
number (dropout masks), the orders of gradient surgery, the learning rates. Nothing is read back from the device within
a step, and nothing of a step's own is kept in Python. A step that has no shape is taken one operation after the other.

Every shape is first taken `WARM_UP` times as it will be captured, on the same stream, but without a graph: kernels get
compiled and the optimizer's state comes into being. These are steps of the training like all others.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mtbert.data.padding import measure_budgets
from mtbert.engine.forward import PackedForward
from mtbert.engine.frozen_prefix import PrefixForward
from mtbert.engine.gradients import GradientReport
from mtbert.engine.loss_scale import Scaling
from mtbert.engine.step import PreparedStep, StepResult, TrainStep
from mtbert.errors import ConfigError
from mtbert.optim.schedule import move_learning_rates
from mtbert.optim.surgery import Combined

if TYPE_CHECKING:
    from mtbert.config import TrainConfig
    from mtbert.curriculum import Curriculum

logger = logging.getLogger(__name__)

T = TypeVar("T")

Graphs = Literal["off", "auto", "on"]

WARM_UP = 2
MOST = 16
"""Shapes that are captured at most; each holds the memory of a step's small tensors, and shares that of the large."""


@dataclass(frozen=True)
class Recorded:
    """Work that can be done again."""

    result: Any
    """What the work has returned: tensors that a replay writes to again."""
    replay: Callable[[], None]
    done: bool
    """Whether recording has done the work, too."""


class Recorder(Protocol):
    """A way to record work on a device."""

    def run(self, work: Callable[[], T]) -> T:
        """Do the work as it would be recorded."""

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Record it. Raises RuntimeError, and has then done nothing, for work that cannot be recorded."""


class CudaRecorder:
    """CUDA graphs, on a stream of their own; all share one pool of memory, because only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._sharing: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """The graphs that live in the pool."""

    def run(self, work: Callable[[], T]) -> T:
        """Do it on the stream of the graphs."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Any]) -> Recorded:
        """Capture it; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        if not self._sharing:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        result: Any = None
        failure: BaseException | None = None
        try:
            # thread_local: the thread that makes input ready allocates pinned memory meanwhile, which is none of this.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                try:
                    result = work()
                except BaseException as error:
                    failure = error  # the end of a capture that this broke raises, too, and says less
        except RuntimeError as error:
            failure = failure or error
        finally:
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own when the capture's end raises
        if failure is None:
            self._sharing.add(graph)
            return Recorded(result, graph.replay, done=False)
        self._sharing.clear()  # what a broken capture has left in the pool is no other graph's
        if not isinstance(failure, Exception):
            raise failure
        # Without its frames, which hold the tensors of the capture.
        raise RuntimeError(str(failure) or repr(failure)) from failure.with_traceback(None)


class StepGraphs:
    """The captured steps of a training, by shape."""

    def __init__(
        self, step: TrainStep, recorder: Recorder, *, most: int = MOST, warm_up: int = WARM_UP
    ) -> None:
        self.step = step
        self.counts: Counter[str] = Counter()
        """How many steps were `replayed`, `warm-up`, or taken one operation after the other, by the reason."""
        self._recorder = recorder
        self._most, self._warm_up = most, warm_up
        self._entries: dict[object, _Entry] = {}
        self._trained: tuple[bool, ...] = ()

    def run(self, ready: PreparedStep, progress: float = 0.0) -> StepResult:
        """Train on what was prepared."""
        if ready.shape is None:
            return self._without(ready.unfit, ready, progress)
        trained = tuple(p.requires_grad for p in self.step.parameters)
        if trained != self._trained:  # gradual unfreezing: the graphs know nothing of the gradients of others
            self.forget()
            self._trained = trained
        entry = self._entries.get(ready.shape)
        if entry is None:
            if len(self._entries) == self._most:
                return self._without(f"more than {self._most} shapes", ready, progress)
            entry = self._entries[ready.shape] = _Entry(ready, self.step.forward.device)
        if entry.problem:
            return self._without(entry.problem, ready, progress)
        entry.load(ready)
        if entry.recorded is not None:
            entry.recorded.replay()
        elif entry.taken < self._warm_up:
            entry.taken += 1
            self.counts["warm-up"] += 1
            return entry.result(self._recorder.run(lambda: _flat(self._take(entry))), ready)
        else:
            try:
                entry.recorded = self._recorder.record(lambda: _flat(self._take(entry)))
            except RuntimeError as error:
                entry.problem = f"capture failed: {str(error).splitlines()[0] if str(error) else error!r}"
                logger.warning("graphs: a step of %s is not captured: %s", _named(ready), entry.problem)
                return self._without(entry.problem, ready, progress)
            if not entry.recorded.done:
                entry.recorded.replay()
        self.counts["replayed"] += 1
        return entry.result(entry.recorded.result.clone(), ready)

    def forget(self) -> None:
        """Drop all captured steps: what they read or write has been replaced, or they train other parameters."""
        self._entries.clear()

    def summary(self) -> str:
        """How the steps were taken."""
        return ", ".join(f"{count:,} {name}" for name, count in self.counts.most_common()) or "no step"

    def _take(self, entry: _Entry) -> StepResult:
        entry.form = self.step.eager(entry.buffers)
        return entry.form

    def _without(self, reason: str, ready: PreparedStep, progress: float) -> StepResult:
        self.counts[f"eager ({reason})"] += 1
        return self.step.eager(ready, progress)


class _Entry:
    """One shape: its buffers, and what was captured."""

    def __init__(self, ready: PreparedStep, device: torch.device) -> None:
        counted = replace(ready, counter=torch.tensor([ready.step]))
        self.buffers = counted.mapped(lambda tensor: torch.empty_like(tensor, device=device))
        self._targets = _tensors(self.buffers)
        self.taken = 0
        self.recorded: Recorded | None = None
        self.form: StepResult | None = None
        """What a step gives back; its names and shapes are those of every step of this entry."""
        self.problem = ""

    def load(self, ready: PreparedStep) -> None:
        """Put a step's input into the buffers."""
        counted = replace(ready, counter=None)
        counter, *targets = reversed(self._targets)
        counter.fill_(ready.step)
        for target, source in zip(reversed(targets), _tensors(counted), strict=True):
            target.copy_(source, non_blocking=True)

    def result(self, flat: Tensor, ready: PreparedStep) -> StepResult:
        """The step's result, read from its numbers [n]."""
        assert self.form is not None
        form, rest = self.form, iter(flat.split([tensor.numel() for tensor in _outputs(self.form)]))

        def read(like: Tensor) -> Tensor:
            return next(rest).view(like.shape)

        losses = {task: read(value) for task, value in form.losses.items()}
        objectives = {name: read(value) for name, value in form.objectives.items()}
        total, norm, finite = read(form.total), read(form.grad_norm), read(form.finite)
        batch = ready.passes[0].batch
        assert batch is not None
        segments = {segment.stream: segment for segment in batch.segments}
        examples = tuple((segments[segment.stream], read(value)) for segment, value in form.examples)
        gradients = None
        if form.gradients is not None:
            made = form.gradients.combined
            gram = read(form.gradients.gram)
            combined = Combined(read(made.shared), read(made.own), read(made.altered))
            gradients = GradientReport(form.gradients.tasks, gram, combined)
        weights = {task: read(value) for task, value in form.weights.items()}
        scaling = (
            None if form.scaling is None else Scaling(read(form.scaling.scale), read(form.scaling.skipped))
        )
        tokens = sum(each.tokens for each in ready.passes)
        return StepResult(
            ready.step, losses, objectives, total, norm, finite, tokens, examples, gradients, weights, scaling
        )


def _tensors(ready: PreparedStep) -> list[Tensor]:
    found: list[Tensor] = []
    ready.mapped(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _outputs(result: StepResult) -> list[Tensor]:
    """The numbers of a result, in the order in which `_Entry.result` reads them."""

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


def _flat(result: StepResult) -> Tensor:
    """The numbers of a result in one tensor [n], which one copy saves from the next replay."""
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in _outputs(result)])


def _named(ready: PreparedStep) -> str:
    return ", ".join(ready.tasks)


# ---- whether a run can have them ----


def obstacles(config: TrainConfig, step: TrainStep, curriculum: Curriculum) -> list[str]:
    """Why no step of a run can be captured; empty where some can."""
    device = step.forward.device
    found = {
        f"the device is {device.type}, and CUDA graphs need a GPU": device.type != "cuda",
        f"mode {config.mode} reads cached features": not isinstance(step.forward, PackedForward),
        "the outputs of frozen layers come from files (frozen_cache)": (
            isinstance(step.forward, PrefixForward) and step.forward.serves
        ),
        f"{', '.join(o.name for o in step.objectives)} choose rows on the host": bool(step.objectives),
        f"curriculum.mixing {config.curriculum.mixing} changes the tasks' rows": curriculum.follows_scores,
        "several ranks train": step.world.size > 1,
        f"profile {config.profile} names the operations of a step one by one": config.profile != "none",
    }
    return [reason for reason, is_there in found.items() if is_there]


def use_graphs(config: TrainConfig, step: TrainStep, curriculum: Curriculum) -> str:
    """Have the run's steps captured as `config.graphs` says; returns what came of it, for the log and the record.

    Raises ConfigError, with the reasons, where they are asked for (`on`) and cannot be had.
    """
    if config.graphs == "off":
        return "off"
    reasons = obstacles(config, step, curriculum)
    if reasons:
        if config.graphs == "on":
            raise ConfigError(f"graphs: on is not possible: {'; '.join(reasons)}; possible: auto, off")
        return f"off: {'; '.join(reasons)}"
    enable(step, curriculum, CudaRecorder(step.forward.device))
    return "on"


def enable(step: TrainStep, curriculum: Curriculum, recorder: Recorder) -> StepGraphs:
    """Pad the steps to the budgets of the curriculum's batches, and capture them."""
    make_capturable(step.optimizer, step.forward.device)
    words = step.model.encoder.embeddings.word.shape[0] if step.wants_words else 0
    step.budgets = measure_budgets(curriculum.batches, step.data, vocabulary=words)
    step.graphs = StepGraphs(step, recorder)
    return step.graphs


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Have the optimizer read its learning rates from the device, where `set_learning_rate` writes them."""
    for group in optimizer.param_groups:
        group["capturable"] = True
    move_learning_rates(optimizer, device)

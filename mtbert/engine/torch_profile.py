"""torch's profiler over some steps of a run: a trace, and a summary of where the time went."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from mtbert.engine.breakdown import STEP, break_down
from mtbert.engine.call_costs import Later, cost_of
from mtbert.engine.flops import EncoderSizes
from mtbert.engine.peak_memory import forget_peak, peak_memory
from mtbert.engine.peaks import measure_peaks
from mtbert.engine.profile_events import slices_of
from mtbert.engine.profile_summary import Measured, summarise, write_summary
from mtbert.engine.range_tree import Label, RangeTree
from mtbert.evaluation.profile import FOLDER
from mtbert.ranges import APART, NOTHING, Range

logger = logging.getLogger(__name__)


class TorchProfile(RangeTree):
    """Counts steps from where it begins, records some of them, and leaves a trace and a summary in RUN/profile.

    Outside of the recorded steps nothing is a range; only evaluations, checkpoints and predictions are timed. Where one
    of these comes, a recording ends: its events, without number, would bury those of the steps.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        model: nn.Module,
        *,
        skip: int,
        active: int,
        encoder: EncoderSizes,
        tokens: int,
    ) -> None:
        """folder: the run's. skip: steps before the recorded ones, at least 1. encoder, tokens: for the limits."""
        super().__init__()
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.model = model
        self.skip = skip
        self.active = active
        self.encoder = encoder
        self.tokens = tokens
        self._steps = 0
        self._recording = self._in_step = self._apart = self._over = False
        self._functions = _Functions()
        self._labels: dict[str, Label] = {}
        self._costs: list[tuple[str, str, Later]] = []
        self._known = 0
        """Costs of the steps before the one that runs."""
        self._recorded: list[int] = []
        self._others: list[float] = []
        self._times: dict[str, list[float]] = {}
        self._measured: Measured | None = None
        self._hooks = ExitStack()
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=skip - 1, warmup=1, active=active, repeat=1),
            on_trace_ready=self._take,
        )

    def __enter__(self) -> TorchProfile:
        self._profiler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        if self._measured is not None:
            write_summary(self.folder, summarise(self._measured, others=self._others, apart=self._times))
        elif kind is None:
            logger.warning(
                "profile: nothing was recorded, because no more than %d steps were taken (profiling.skip_steps: %d)",
                self._steps,
                self.skip,
            )

    def span(self, parts: tuple[object, ...]) -> Range:
        """See `mtbert.ranges.Listener`."""
        if parts[0] == STEP:
            return _Step(self, int(str(parts[1])))
        if parts[0] in APART and not self._apart:
            return _Apart(self, str(parts[0]))
        return super().span(parts) if self._recording else NOTHING

    def call(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """See `mtbert.ranges.Listener`."""
        if not self._recording:
            return function(*args, **kwargs)
        return super().call(name, function, args, kwargs)

    def plain_span(self, *parts: object) -> Range:
        """A range, while steps are recorded."""
        return super().span(parts) if self._recording else NOTHING

    def begin_step(self) -> None:
        """Record from here on, where the recorded steps begin."""
        self._in_step = True
        self._known = len(self._costs)
        if self._steps and not self._over:
            self._profiler.step()
        if self._steps == self.skip:
            forget_peak(self.device)
            self._hooks.enter_context(self.modules(self.model))
            self._recording = True

    def end_step(self, number: int, seconds: float) -> None:
        """Count step `number` of the run; after the last recorded one, read what was recorded."""
        self._in_step = False
        if self._recording:
            self._recorded.append(number)
        elif self._steps:  # the first step of a process is no measure of the others
            self._others.append(seconds)
        self._steps += 1
        if len(self._recorded) == self.active:
            self._end()

    def fail_step(self, number: int) -> None:
        """Step `number` has failed, and counts for nothing: its ranges are those of no step."""
        self._in_step = False
        self._labels.pop(f"{STEP} {number}", None)
        del self._costs[self._known :]

    def begin_apart(self) -> None:
        """Something that is no step begins."""
        self._apart = True
        if self._recording:
            self._end()

    def end_apart(self, name: str, seconds: float) -> None:
        """It has ended."""
        self._apart = False
        self._times.setdefault(name, []).append(seconds)

    def _open(self, label: Label) -> None:
        self._labels[label.name] = label
        function = record_function(label.name)
        function.__enter__()
        self._functions.open.append(function)

    def _close(self) -> None:
        self._functions.open.pop().__exit__(None, None, None)

    def _cost(
        self, operation: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[str], None] | None:
        later = cost_of(operation, args, kwargs) if self._in_step else None
        if later is None:
            return None
        return lambda direction: self._costs.append((operation, direction, later))

    def _end(self) -> None:
        """Record no more. Where anything was recorded, the profiler calls `_take`."""
        if self._over:
            return
        self._over, self._recording = True, False
        self._hooks.close()
        self._profiler.stop()

    def _take(self, profiler: profile) -> None:
        """The profiler has stopped: keep its trace, and read from it what the summary needs."""
        if not self._recorded:
            return
        memory = peak_memory(self.device)
        first, last = self._recorded[0], self._recorded[-1]
        trace = self.folder / FOLDER / f"trace-steps-{first}-{last}.json.gz"
        _export(profiler, trace)
        self._measured = Measured(
            first=first,
            last=last,
            trace=trace.name,
            device=self.device,
            breakdown=break_down(
                slices_of(profiler.events() or (), self._labels), on_device=self.device.type == "cuda"
            ),
            costs=[(operation, direction, later()) for operation, direction, later in self._costs],
            peaks=measure_peaks(self.device, self.dtype, self.encoder, self.tokens),
            memory=memory,
        )
        self._costs.clear()
        write_summary(self.folder, summarise(self._measured, others=self._others, apart=self._times))
        logger.info("profile: steps %d to %d are in %s", first, last, trace)


class _Functions(threading.local):
    """The open ranges of one thread, oldest first."""

    def __init__(self) -> None:
        self.open: list[record_function] = []


class _Step:
    """The range of a step; the profile is read when it ends, after its time has been taken."""

    def __init__(self, owner: TorchProfile, number: int) -> None:
        self.owner = owner
        self.number = number
        self._range: Range = NOTHING
        self._begun = 0.0

    def __enter__(self) -> _Step:
        self.owner.begin_step()
        self._range = self.owner.plain_span(STEP, self.number)
        self._begun = time.perf_counter()
        self._range.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._range.__exit__(kind, error, trace)
        if kind is None:
            self.owner.end_step(self.number, time.perf_counter() - self._begun)
        else:
            self.owner.fail_step(self.number)

    def ends_in(self, *outputs: torch.Tensor) -> None:
        """A step has no backward pass of its own."""


class _Apart:
    """An evaluation, a checkpoint or a prediction: timed, not recorded."""

    def __init__(self, owner: TorchProfile, name: str) -> None:
        self.owner = owner
        self.name = name
        self._begun = 0.0

    def __enter__(self) -> _Apart:
        self.owner.begin_apart()
        self._begun = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.owner.end_apart(self.name, time.perf_counter() - self._begun)

    def ends_in(self, *outputs: torch.Tensor) -> None:
        """It has no backward pass."""


def _export(profiler: profile, trace: Path) -> None:
    """Write the trace as a whole or not at all; a full disk is no reason to end a training."""
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        partial = trace.with_name(f".partial-{trace.name}")
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, trace)
    except OSError as error:
        logger.warning("profile: %s cannot be written: %s", trace, error.strerror or error)

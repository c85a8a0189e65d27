"""Where the time of profiled steps went: by phase, by operation, and what neither explains."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from mtbert.engine.range_tree import Label
from mtbert.ranges import PHASES

STEP = "step"
"""The first word of the names of the steps' ranges."""


@dataclass
class Slice:
    """One range as it was recorded; times in microseconds of one clock."""

    label: Label
    thread: int
    start: float
    end: float
    device: float = 0.0
    """Time on the device of the kernels that were launched in it and in no range within it."""
    parent: Slice | None = field(default=None, repr=False)
    inner: float = 0.0
    """Time of the ranges directly within it."""


@dataclass
class Breakdown:
    """Seconds of all profiled steps together.

    On a CPU they are those of the ranges. On a GPU they are those of the kernels that the ranges launched, and the rest
    of a step is time in which the device waits, or works for nobody's range.
    """

    steps: int
    total: float
    phases: dict[str, float]
    """By phase, the outermost of a step counting."""
    outside: dict[str, float]
    """The part of each phase that lies in no operation."""
    operations: dict[str, dict[str, float]]
    """By operation and direction."""

    @property
    def unexplained(self) -> float:
        """What lies in no phase."""
        return max(0.0, self.total - sum(self.phases.values()))


def break_down(slices: Sequence[Slice], *, on_device: bool) -> Breakdown:
    """Add up the ranges of the steps among `slices`. `on_device`: by the kernels' time instead of the ranges' own.

    The steps' thread says which phase is when; ranges of other threads (autograd's, for a GPU) count to it by time.
    """
    _nest(slices)
    steps = sorted((s for s in slices if s.label.name.startswith(f"{STEP} ")), key=lambda s: s.start)
    found = Breakdown(len(steps), 1e-6 * sum(s.end - s.start for s in steps), {}, {}, {})
    if not steps:
        return found
    main = steps[0].thread
    phases = sorted((s for s in slices if s.thread == main and _phase_above(s) is s), key=lambda s: s.start)
    starts = [phase.start for phase in phases]
    for each in slices:
        phase = _phase_above(each) if each.thread == main else _at(each.start, phases, starts)
        if phase is None:
            continue
        seconds = 1e-6 * (each.device if on_device else each.end - each.start - each.inner)
        name = phase.label.name
        found.phases[name] = found.phases.get(name, 0.0) + seconds
        worker = _operation_above(each)
        if worker is None:
            found.outside[name] = found.outside.get(name, 0.0) + seconds
        else:
            times = found.operations.setdefault(worker.operation, {})
            times[worker.direction] = times.get(worker.direction, 0.0) + seconds
    return found


def _nest(slices: Sequence[Slice]) -> None:
    """Find what each range lies in, thread by thread."""
    above: list[Slice] = []
    for each in sorted(slices, key=lambda s: (s.thread, s.start, -s.end)):
        while above and (above[-1].thread != each.thread or above[-1].end <= each.start):
            above.pop()
        if above:
            each.parent = above[-1]
            above[-1].inner += each.end - each.start
        above.append(each)


def _phase_above(each: Slice) -> Slice | None:
    """The outermost phase of a step that holds the range; None outside of steps and of phases."""
    phase, at = None, each
    while at.parent is not None:
        if at.label.name in PHASES:
            phase = at
        at = at.parent
    return phase if at.label.name.startswith(f"{STEP} ") else None


def _operation_above(each: Slice) -> Label | None:
    at: Slice | None = each
    while at is not None:
        if at.label.operation:
            return at.label
        at = at.parent
    return None


def _at(moment: float, phases: Sequence[Slice], starts: Sequence[float]) -> Slice | None:
    place = bisect_right(starts, moment) - 1
    return phases[place] if place >= 0 and moment < phases[place].end else None

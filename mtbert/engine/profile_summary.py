"""RUN/profile/profile.json: what a profile of some steps came to, for the report."""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtbert.engine.breakdown import Breakdown
from mtbert.engine.call_costs import PRODUCTS
from mtbert.engine.costs import Cost
from mtbert.engine.durable import replace_file
from mtbert.engine.environment import device_name
from mtbert.engine.peaks import Peaks
from mtbert.evaluation.profile import FOLDER, SUMMARY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """What is known once the recorded steps are over."""

    first: int
    last: int
    """Numbers of the recorded steps, from 1."""
    trace: str
    """The name of the trace's file."""
    device: torch.device
    breakdown: Breakdown
    costs: Sequence[tuple[str, str, Cost]]
    """Operation, direction and cost of every call of the recorded steps."""
    peaks: Peaks
    memory: tuple[int, str] | None
    """Bytes, and of what they are the peak."""


def summarise(
    measured: Measured, *, others: Sequence[float], apart: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The content of profile.json; times in seconds, those of phases and operations a step.

    others: seconds of steps that were not recorded. apart: seconds of each evaluation, checkpoint and prediction.
    """
    found = measured.breakdown
    steps = max(1, found.steps)
    work = _work(measured.costs)
    return {
        "first_step": measured.first,
        "last_step": measured.last,
        "trace": measured.trace,
        "device": device_name(measured.device),
        "clock": "host" if measured.device.type == "cpu" else "device",
        "step_seconds": found.total / steps,
        "other_steps": {"count": len(others), "median_seconds": statistics.median(others)}
        if others
        else None,
        "phases": {
            name: {"seconds": seconds / steps, "outside_operations": found.outside.get(name, 0.0) / steps}
            for name, seconds in found.phases.items()
        },
        "unexplained_seconds": found.unexplained / steps,
        "operations": {
            name: {
                "seconds": {direction: seconds / steps for direction, seconds in times.items()},
                "flops": work[name][0] / steps if name in work else None,
                "bytes": work[name][1] / steps if name in work else None,
                "products": name in PRODUCTS,
            }
            for name, times in found.operations.items()
        },
        "peaks": asdict(measured.peaks),
        "peak_memory": None
        if measured.memory is None
        else {"bytes": measured.memory[0], "of": measured.memory[1]},
        "apart": {name: {"count": len(times), "seconds": sum(times)} for name, times in apart.items()},
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write it into the run's folder; a full disk is no reason to end a training."""
    path = folder / FOLDER / SUMMARY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(summary, indent=1) + "\n").encode())
    except OSError as error:
        logger.warning("profile: %s cannot be written: %s", path, error.strerror or error)


def _work(costs: Iterable[tuple[str, str, Cost]]) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes of each operation."""
    found: dict[str, tuple[float, float]] = {}
    for operation, direction, cost in costs:
        backward = direction == "backward"
        flops, moved = found.get(operation, (0.0, 0.0))
        found[operation] = (
            flops + (cost.backward_flops if backward else cost.forward_flops),
            moved + (cost.backward_bytes if backward else cost.forward_bytes),
        )
    return found

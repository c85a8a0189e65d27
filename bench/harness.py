"""Builds the sides of a comparison, runs them alternately, records the result."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.comparison import Comparison, Goal, summarise
from bench.flops import product_side
from bench.measure import Alternation, Side
from bench.peers import is_installed, peer_versions
from bench.workload import Workload
from mtbert.engine.environment import environment
from mtbert.engine.flops import EncoderSizes, Pass, training_flops
from mtbert.engine.peaks import limit_shapes, synchronise
from mtbert.kernels import dispatch
from mtbert.model.lora import LoraConfig
from mtbert.model.pretrained import load_config

RECORDED_REPEATS = 5
"""A result of fewer repeats is shown, not recorded."""

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: the seconds that all threads of this process have computed. With one thread it is hardly moved by other work
on the machine, so it shows ratios where the wall clock shows noise; with more it counts threads that wait too."""


@dataclass(frozen=True)
class Candidate:
    """A side to be: built only when its comparison runs, and only when its packages are installed."""

    name: str
    build: Callable[[], Side]
    dtype: torch.dtype
    mode: Pass | None = "full"
    """What its products are counted as; None: no share of the limit is given."""
    lora: LoraConfig | None = None
    needs: tuple[str, ...] = ()


@dataclass
class Bench:
    """What all comparisons of a session share."""

    workload: Workload
    device: torch.device
    repeats: int
    clock: str = "wall"
    """A name in CLOCKS."""
    results: Path | None = None
    """Folder of the records; None: nothing is recorded."""
    comparisons: list[Comparison] = field(default_factory=list)

    def compare(
        self,
        name: str,
        candidates: Sequence[Candidate],
        benchmark: Any,
        *,
        baseline: str,
        goals: Sequence[Goal] = (),
    ) -> Comparison:
        """Run the candidates and the matrix-product limits of their dtypes in turn.

        benchmark: the fixture of pytest-benchmark; it times whole rounds, and its JSON file carries the comparison.
        """
        present = [c for c in candidates if is_installed(*c.needs)]
        sizes = encoder_sizes(self.workload)
        limits = {dtype: limit_name(dtype) for dtype in dict.fromkeys(c.dtype for c in present)}
        shapes = limit_shapes(self.device, sizes, self.workload.tokens // len(self.workload.steps))
        sides = [c.build() for c in present]
        sides += [product_side(limit, self.device, dtype, shapes) for dtype, limit in limits.items()]
        if self.clock != "wall":
            name = f"{name} ({self.clock} seconds)"
        clock = CLOCKS[self.clock]
        alternation = Alternation(sides, synchronise=lambda: synchronise(self.device), clock=clock)
        load_before = load()
        alternation.warm_up(self.repeats - 1)
        gc.collect()
        benchmark.pedantic(alternation.round, rounds=self.repeats, iterations=1)
        comparison = summarise(
            name,
            alternation,
            baseline=baseline,
            limits=list(limits.values()),
            limit_of={c.name: (limits[c.dtype], self._flops_per_token(c)) for c in present if c.mode},
            goals=goals,
            left_out=[c.name for c in candidates if c not in present],
        )
        benchmark.extra_info.update(comparison.to_record())
        facts = self.facts(present[0].dtype) | {
            "clock": self.clock,
            "load": [load_before, load()],
            "tokens_per_step": self.workload.tokens // len(self.workload.steps),
        }
        if self.results is not None and alternation.rounds >= RECORDED_REPEATS:
            records.write(self.results, facts.pop("device"), name, comparison.to_record(), facts)
        self.comparisons.append(comparison)
        return comparison

    def facts(self, dtype: torch.dtype) -> dict[str, Any]:
        """What a result was measured on and with, for its record."""
        facts = environment(self.device)
        facts["versions"] |= peer_versions()
        return facts | {
            "source": self.workload.source,
            "encoder": self.workload.encoder_name,
            "kernels": kernels_in_use(self.device, dtype),
        }

    def _flops_per_token(self, candidate: Candidate) -> float:
        assert candidate.mode is not None
        lora = candidate.lora
        flops = training_flops(
            encoder_sizes(self.workload),
            self.workload.row_lengths(),
            candidate.mode,
            rank=lora.rank if lora else 0,
            adapted=lora.projections if lora else (),
        )
        return flops / self.workload.tokens


def encoder_sizes(workload: Workload) -> EncoderSizes:
    """Those of the workload's encoder."""
    config = load_config(workload.encoder)
    return EncoderSizes(config.num_hidden_layers, config.hidden_size, config.intermediate_size)


def limit_name(dtype: torch.dtype) -> str:
    """Of the side that measures products of `dtype`."""
    return f"matrix products {str(dtype).removeprefix('torch.')}"


def kernels_in_use(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """The implementation of each operation."""
    return {e.operation: e.implementation for e in dispatch.explain(device.type, dtype)}


def load() -> float | None:
    """Processes that wanted to run in the last minute: above the number of cores, others were in the way."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None

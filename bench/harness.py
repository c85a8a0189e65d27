"""Builds the sides of a comparison, runs them alternately, records the result."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import records
from bench.comparison import MEMORY, Comparison, Goal, summarise
from bench.flops import product_side
from bench.measure import Alternation, Side
from bench.peers import is_installed, peer_versions
from bench.workload import REAL, Workload
from mtbert.engine.environment import environment
from mtbert.engine.flops import EncoderSizes, Pass, training_flops
from mtbert.engine.peaks import limit_shapes, synchronise
from mtbert.engine.precision import has_fast_bf16
from mtbert.kernels import dispatch
from mtbert.model.lora import LoraConfig
from mtbert.model.pretrained import load_config

USUAL = {"cpu": ("minilm", 4096), "cuda": ("bert-base", 16384)}
"""The encoder and the useful tokens of a step that a device's goals are set for."""

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
    heavy: bool = False
    """Only `--full` sessions run it."""
    workload: Workload | None = None
    """Its sentences, where they are not the session's."""
    only_on: str | None = None
    """The type of device that it needs, where others cannot run it."""


@dataclass
class Bench:
    """What all comparisons of a session share."""

    workload: Workload
    device: torch.device
    repeats: int
    full: bool = False
    """Whether heavy sides run."""
    clock: str = "wall"
    """A name in CLOCKS."""
    results: Path | None = None
    """Folder of the records; None: nothing is recorded."""
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def setting(self) -> Literal["two cores", "one GPU"] | None:
        """What this session measures of the settings that goals are set for; None: they don't apply."""
        usual = self.workload.source == REAL
        cpu = self.device.type == "cpu" and torch.get_num_threads() == 2 and has_fast_bf16(self.device)
        measured = (self.workload.encoder_name, self.workload.wanted_tokens)
        if usual and cpu and measured == USUAL["cpu"]:
            return "two cores"
        if usual and self.device.type == "cuda" and measured == USUAL["cuda"]:
            return "one GPU"
        return None

    def aim(self, *, two_cores: float | None = None, one_gpu: float | None = None) -> float | None:
        """The bound of a goal in this session's setting; None where no goal is set for it."""
        return {"two cores": two_cores, "one GPU": one_gpu}.get(self.setting or "")

    def compare(
        self,
        name: str,
        candidates: Sequence[Candidate],
        benchmark: Any,
        *,
        baseline: str,
        goals: Sequence[Goal] = (),
        memory: bool = False,
        repeats: int | None = None,
        unit: str = "useful tokens",
    ) -> Comparison:
        """Run the candidates and the matrix-product limits of their dtypes in turn.

        benchmark: the fixture of pytest-benchmark; it times whole rounds, and its JSON file carries the comparison.
        memory: also measure the sides' activations. repeats: instead of the session's. unit: what
        the sides' work counts.
        """
        repeats = min(repeats or self.repeats, self.repeats)
        left_out = {c.name: reason for c in candidates if (reason := self._why_not(c))}
        present = [c for c in candidates if c.name not in left_out]
        workloads = [c.workload or self.workload for c in present]
        limits = {dtype: limit_name(dtype) for dtype in dict.fromkeys(c.dtype for c in present)}
        shapes = limit_shapes(self.device, encoder_sizes(workloads[0]), workloads[0].tokens_per_step)
        sides: list[Side] = []
        try:
            sides += [c.build() for c in present]
            sides += [product_side(limit, self.device, dtype, shapes) for dtype, limit in limits.items()]
            if self.clock != "wall":
                name = f"{name} ({self.clock} seconds)"
            alternation = Alternation(
                sides, synchronise=lambda: synchronise(self.device), clock=CLOCKS[self.clock]
            )
            load_before = load()
            alternation.warm_up(repeats - 1)
            gc.collect()
            benchmark.pedantic(alternation.round, rounds=repeats, iterations=1)
            load_after = load()
            if memory:
                for side in sides:
                    if side.activations is not None:
                        tokens, held = side.activations()
                        side.figures[MEMORY] = held / 2**10 / tokens
            comparison = summarise(
                name,
                alternation,
                baseline=baseline,
                limits=list(limits.values()),
                limit_of={c.name: (limits[c.dtype], self._flops_per_token(c)) for c in present if c.mode},
                goals=goals,
                left_out=[f"{side} ({reason})" for side, reason in left_out.items()],
            )
            comparison.unit = unit
            comparison.profiles = _profiles(comparison, sides)
        finally:
            for side in sides:
                side.close()
        benchmark.extra_info.update(comparison.to_record())
        sizes = list(dict.fromkeys(workload.tokens_per_step for workload in workloads))
        facts = self.facts(present[0].dtype) | {
            "clock": self.clock,
            "load": [load_before, load_after],
            "tokens_per_step": sizes[0] if len(sizes) == 1 else sizes,
            "setting": self.setting,
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

    def _why_not(self, candidate: Candidate) -> str | None:
        """Why this session leaves a candidate out."""
        missing = [package for package in candidate.needs if not is_installed(package)]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if candidate.only_on not in (None, self.device.type):
            return f"needs {candidate.only_on}, the device is {self.device.type}"
        return "only with --full" if candidate.heavy and not self.full else None

    def _flops_per_token(self, candidate: Candidate) -> float:
        assert candidate.mode is not None
        lora, workload = candidate.lora, candidate.workload or self.workload
        flops = training_flops(
            encoder_sizes(workload),
            workload.row_lengths(),
            candidate.mode,
            rank=lora.rank if lora else 0,
            adapted=lora.projections if lora else (),
        )
        return flops / workload.tokens


def _profiles(comparison: Comparison, sides: Sequence[Side]) -> dict[str, dict[str, Any]]:
    """Of each side that missed a goal of speed: where the time of its step goes, where the side can say so."""
    missed = {outcome.goal.side for outcome in comparison.goals if outcome.met is False}
    return {side.name: side.profile() for side in sides if side.name in missed and side.profile is not None}


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

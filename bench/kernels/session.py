"""What the comparisons of kernels share in a session: where they run, what is recorded, the tables at the end."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import records
from bench.comparison import Comparison, to_text
from bench.harness import RECORDED_REPEATS, kernels_in_use, load
from bench.kernels.comparisons import Plan, compare, compare_layer
from bench.kernels.shapes import BERT_BASE
from bench.kernels.timing import Stopwatch
from bench.measure import Alternation
from mtbert.engine.environment import environment
from mtbert.engine.precision import has_fast_bf16, resolve_device

RUNS = {"cuda": 9, "cpu": 3}
Measure = Callable[[Alternation], None]


@dataclass
class Kernels:
    """What the comparisons of a session share; also prints them at its end."""

    stopwatch: Stopwatch
    repeats: int
    results: Path | None
    """Folder of the records; None: nothing is recorded."""
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where everything runs."""
        return self.stopwatch.device

    @property
    def dtype(self) -> torch.dtype:
        """What the device multiplies fastest."""
        return torch.bfloat16 if has_fast_bf16(self.device) else torch.float32

    def plan(self, operation: str, tokens: int, **more: Any) -> Plan:
        """A comparison at the sizes of bert-base on sentences, unless `more` says otherwise."""
        settled = {"encoder": BERT_BASE, "rows": "sentences", "device": self.device, "dtype": self.dtype}
        return Plan(operation=operation, tokens=tokens, **{**settled, **more})

    def compare(self, plan: Plan, benchmark: Any) -> None:
        """An operation beside its peers."""
        run = compare_layer if plan.operation == "encoder_layer" else compare
        self.run(plan.name, lambda measure: run(plan, self.stopwatch, measure), benchmark)

    def run(self, name: str, run: Callable[[Measure], Comparison], benchmark: Any) -> None:
        """Run a comparison, record it under its name, and keep it for the end."""

        def measure(alternation: Alternation) -> None:
            alternation.warm_up()
            gc.collect()
            benchmark.pedantic(alternation.round, rounds=self.repeats, iterations=1)

        comparison = run(measure)
        benchmark.extra_info.update(comparison.to_record())
        self.comparisons.append(comparison)
        if self.results is None:
            return
        facts = environment(self.device)
        facts["versions"]["triton"] = metadata.version("triton")
        facts |= {"load": load(), "kernels": kernels_in_use(self.device, self.dtype)}
        records.write(self.results, facts.pop("device"), name, comparison.to_record(), facts)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Called by pytest."""
        terminalreporter.section("mtbert kernels")
        for comparison in self.comparisons:
            terminalreporter.write_line(f"{to_text(comparison)}\n")


def make_kernels(pytestconfig: pytest.Config) -> Kernels:
    """By the options of the command line."""
    option = pytestconfig.getoption
    device = resolve_device(option("--device"))
    repeats = option("--repeats") or (15 if option("--full") else RECORDED_REPEATS)
    # What a CPU does at these sizes says nothing about kernels that were written for a GPU.
    recorded = device.type == "cuda" and repeats >= RECORDED_REPEATS
    stopwatch = Stopwatch(device, RUNS[device.type])
    made = Kernels(stopwatch, repeats, option("--results") if recorded else None)
    pytestconfig.pluginmanager.register(made, "mtbert kernels")
    return made

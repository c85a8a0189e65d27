"""Each kernel beside its peers and the speed of memory; on a CPU small, so that the harness is always exercised."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import records
from bench.comparison import Comparison, to_text
from bench.harness import RECORDED_REPEATS, kernels_in_use, load
from bench.kernel_comparisons import Plan, compare, compare_layer
from bench.kernel_shapes import BERT_BASE, MINILM
from bench.kernel_timing import Stopwatch
from bench.measure import Alternation
from mtbert.engine.environment import environment
from mtbert.engine.precision import has_fast_bf16, resolve_device

TOKENS = {"cuda": (8192, 16384, 32768, 65536), "cpu": (256,)}
RUNS = {"cuda": 9, "cpu": 3}
OPERATIONS = (
    "attention",
    "add_layer_norm",
    "bias_gelu",
    "linear_bias_gelu",
    "embedding",
    "softmax",
    "dropout",
)


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
        """Run, record, and keep for the end."""

        def measure(alternation: Alternation) -> None:
            alternation.warm_up()
            gc.collect()
            benchmark.pedantic(alternation.round, rounds=self.repeats, iterations=1)

        run = compare_layer if plan.operation == "encoder_layer" else compare
        comparison = run(plan, self.stopwatch, measure)
        benchmark.extra_info.update(comparison.to_record())
        self.comparisons.append(comparison)
        if self.results is None:
            return
        facts = environment(self.device)
        facts["versions"]["triton"] = metadata.version("triton")
        facts |= {"load": load(), "kernels": kernels_in_use(self.device, plan.dtype)}
        records.write(self.results, facts.pop("device"), plan.name, comparison.to_record(), facts)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Called by pytest."""
        terminalreporter.section("mtbert kernels")
        for comparison in self.comparisons:
            terminalreporter.write_line(f"{to_text(comparison)}\n")


@pytest.fixture(scope="module")
def kernels(pytestconfig: pytest.Config) -> Kernels:
    option = pytestconfig.getoption
    device = resolve_device(option("--device"))
    repeats = option("--repeats") or (15 if option("--full") else RECORDED_REPEATS)
    # What a CPU does at these sizes says nothing about kernels that were written for a GPU.
    recorded = device.type == "cuda" and repeats >= RECORDED_REPEATS
    stopwatch = Stopwatch(device, RUNS[device.type])
    made = Kernels(stopwatch, repeats, option("--results") if recorded else None)
    pytestconfig.pluginmanager.register(made, "mtbert kernels")
    return made


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of tokens."""
    if "tokens" in metafunc.fixturenames:
        option = metafunc.config.getoption
        device = resolve_device(option("--device"))
        metafunc.parametrize("tokens", (option("--tokens"),) if option("--tokens") else TOKENS[device.type])


def test_attention_in_long_rows(kernels: Kernels, benchmark: Any, tokens: int) -> None:
    kernels.compare(kernels.plan("attention", max(tokens, 1024), rows="reviews"), benchmark)


def test_encoder_layer(kernels: Kernels, benchmark: Any, tokens: int) -> None:
    kernels.compare(kernels.plan("encoder_layer", tokens), benchmark)


@pytest.mark.parametrize("backward", [True, False], ids=["both", "forward"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernel(kernels: Kernels, benchmark: Any, operation: str, tokens: int, backward: bool) -> None:
    kernels.compare(kernels.plan(operation, tokens, backward=backward), benchmark)


@pytest.mark.parametrize("operation", ["attention", "add_layer_norm", "bias_gelu"])
def test_kernel_of_minilm(kernels: Kernels, benchmark: Any, operation: str, tokens: int) -> None:
    kernels.compare(kernels.plan(operation, tokens, encoder=MINILM), benchmark)

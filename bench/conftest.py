"""Options, the fixture `bench`, and the tables at the end of the session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # bench is not installed
    sys.path.insert(0, str(ROOT))

from bench import records  # noqa: E402
from bench.comparison import to_text  # noqa: E402
from bench.harness import CLOCKS, RECORDED_REPEATS, USUAL, Bench  # noqa: E402
from bench.kernels.session import Kernels, make_kernels  # noqa: E402
from bench.page import write_page  # noqa: E402
from bench.workload import build_workload  # noqa: E402
from mtbert.engine.precision import resolve_device  # noqa: E402
from mtbert.errors import ModelFileError  # noqa: E402

# Fewer steps would make the pool too small for a peer to find batches of like length in it.
_LEAST_STEPS = 5
_BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mtbert bench")
    group.addoption("--full", action="store_true", help="all sides and comparisons, 15 repeats instead of 5")
    group.addoption("--repeats", type=int, help=f"repeats; fewer than {RECORDED_REPEATS} are not recorded")
    group.addoption("--tokens", type=int, help="useful tokens a step (default: 4096; 16384 on a GPU)")
    group.addoption(
        "--encoder",
        help="minilm, a folder, a hub id, or a BERT with random weights: bert-tiny, bert-mini, bert-small, bert-medium,"
        " bert-base, bert-large (default: minilm; bert-base on a GPU)",
    )
    group.addoption("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.addoption(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: for a busy machine, one thread"
    )
    group.addoption("--results", type=Path, default=records.RESULTS, help="folder of the records")


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    """The sentences, the device and the number of repeats of this session."""
    option = pytestconfig.getoption
    device = resolve_device(option("--device"))
    repeats = option("--repeats") or (15 if option("--full") else 5)
    encoder, tokens = USUAL[device.type]
    encoder, tokens = option("--encoder") or encoder, option("--tokens") or tokens
    try:
        workload = build_workload(encoder, tokens_per_step=tokens, steps=max(repeats, _LEAST_STEPS))
    except ModelFileError as error:
        pytest.skip(str(error))
    clock = option("--clock")
    if clock == "cpu":
        if device.type != "cpu":
            raise pytest.UsageError("--clock cpu measures a CPU")
        torch.set_num_threads(1)
    pytestconfig.stash[_BENCH] = Bench(
        workload, device, repeats, option("--full"), clock, option("--results")
    )
    return pytestconfig.stash[_BENCH]


@pytest.fixture
def full(pytestconfig: pytest.Config) -> None:
    """Skips what takes too long for a usual session."""
    if not pytestconfig.getoption("--full"):
        pytest.skip("only with --full")


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> Kernels:
    """The device and the number of repeats of this session's comparisons of kernels."""
    return make_kernels(pytestconfig)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash.get(_BENCH, None)
    if bench is None or not bench.comparisons:
        return
    workload = bench.workload
    terminalreporter.section("mtbert bench")
    terminalreporter.write_line(
        f"{workload.encoder_name}, {workload.source}, {workload.tokens // len(workload.steps):,} useful tokens a step;"
        f" median [quartiles] of {bench.repeats} alternating repeats"
    )
    for comparison in bench.comparisons:
        terminalreporter.write_line(f"\n{to_text(comparison)}")
    if bench.results is not None and bench.repeats >= RECORDED_REPEATS:
        terminalreporter.write_line(f"\n{write_page(bench.results)}")

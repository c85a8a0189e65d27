"""Ranges for Nsight Systems: what is pushed and popped, with a recorded stand-in and with the package itself."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.assembly import assemble, tiny_config

from mtbert.config import TrainConfig
from mtbert.engine.assembly import assemble as assemble_run
from mtbert.engine.nvtx_ranges import DOMAIN, NvtxRanges, check_nvtx
from mtbert.engine.profiling import profiling
from mtbert.errors import ConfigError
from mtbert.ranges import span


class Domain:
    """Notes what it is told, as `nvtx.Domain` is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pushed: list[str] = []
        self.open = 0

    def get_event_attributes(self, message: str, color: str) -> SimpleNamespace:
        return SimpleNamespace(message=message, color=color)

    def push_range(self, attributes: SimpleNamespace) -> None:
        self.pushed.append(attributes.message)
        self.open += 1

    def pop_range(self) -> None:
        self.open -= 1
        assert self.open >= 0


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> Domain:
    found = Domain(DOMAIN)
    module = SimpleNamespace(get_domain=lambda name: {found.name: found}[name], __spec__=object())
    monkeypatch.setitem(sys.modules, "nvtx", module)
    return found


def step(assembly: Any, config: TrainConfig, folder: Path) -> torch.Tensor:
    machine = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    with profiling(config, folder, machine, assembly.model, assembly.model.encoder.config), span("step", 1):
        return assembly.step(plan, 0).grad_norm


def test_a_step_is_pushed_and_popped(tiny_bert: Path, tmp_path: Path, domain: Domain) -> None:
    config = tiny_config(tiny_bert, tmp_path, profile="nvtx")
    step(assemble(config, dtype=torch.float32), config, tmp_path)
    assert domain.open == 0
    assert domain.pushed[0] == "step 1"
    assert {"forward layer 0 attention", "backward layer 0 attention", "loss sst", "optimizer"} <= set(
        domain.pushed
    )
    assert not list(tmp_path.glob("profile*"))


def test_what_a_failed_block_left_open_is_popped(domain: Domain) -> None:
    ranges = NvtxRanges()

    def fail() -> None:
        with ranges.span(("backward",)):
            ranges.push(
                ranges.here("attention")
            )  # as the hook before a node does; the one behind it never comes
            raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        fail()
    assert domain.open == 0
    assert domain.pushed == ["backward", "recompute attention"]


def test_the_package_itself(tiny_bert: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtx")
    found = []
    for profile in ("none", "nvtx"):
        config = tiny_config(tiny_bert, tmp_path, profile=profile)
        found.append(step(assemble(config, dtype=torch.float32), config, tmp_path))
    assert torch.equal(*found)


def test_without_the_package_a_run_does_not_begin(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"profile: nvtx needs the package nvtx.*pip install.*possible: torch"
    ):
        check_nvtx()
    with pytest.raises(ConfigError, match="profile: nvtx"):
        assemble_run(tiny_config(tiny_bert, tmp_path, profile="nvtx"))

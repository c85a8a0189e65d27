"""Which kernels a test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mtbert.kernels import dispatch, extension

_cpu = extension.part("cpu")
INSTRUCTION_SETS = _cpu.instruction_sets() if _cpu is not None else []


@pytest.fixture(params=INSTRUCTION_SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has, in force during the test."""
    if _cpu is None:
        pytest.skip(extension.problem)
    before = _cpu.instruction_set()
    _cpu.set_instruction_set(request.param)
    with dispatch.use_backend("cpu"):
        yield request.param
    _cpu.set_instruction_set(before)


@pytest.fixture
def cpu_kernels() -> Iterator[None]:
    """The C++ kernels, of the best instruction set."""
    if _cpu is None:
        pytest.skip(extension.problem)
    with dispatch.use_backend("cpu"):
        yield

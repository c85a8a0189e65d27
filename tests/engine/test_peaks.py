"""The machine's limits: positive, of the right unit, and measured without touching torch's random numbers."""

from __future__ import annotations

import pytest
import torch

from mtbert.engine import peaks
from mtbert.engine.flops import EncoderSizes
from mtbert.engine.peak_memory import forget_peak, peak_memory
from mtbert.engine.peaks import fastest_product, limit_shapes, measure_peaks, plain_copy

CPU = torch.device("cpu")
SIZES = EncoderSizes(2, 32, 64)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SECONDS", 0.01)
    monkeypatch.setattr(peaks, "_COPY_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(peaks, "limit_shapes", lambda *_: [(64, 64, 64)])


def test_both_limits() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = measure_peaks(CPU, torch.bfloat16, SIZES, 1024)
    assert torch.equal(torch.rand(4), expected)
    assert found.flops is not None
    assert found.bytes is not None
    assert found.flops > 0
    assert found.bytes > 0
    assert found.dtype == "bfloat16"


def test_work_is_counted() -> None:
    assert fastest_product(CPU, torch.float32, [(8, 16, 32)]).amount == 2 * 8 * 16 * 32
    assert plain_copy(CPU).amount == 2 * (1 << 16)
    with pytest.raises(ValueError, match="needs a shape"):
        fastest_product(CPU, torch.float32, [])


def test_the_shapes_of_a_gpu_hold_those_of_the_step() -> None:
    assert limit_shapes(CPU, SIZES, 100) == [(2048, 2048, 2048)]
    assert (100, 96, 32) in limit_shapes(torch.device("cuda"), SIZES, 100)


def test_too_little_memory_leaves_a_limit_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(device: torch.device) -> peaks.Work:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(peaks, "plain_copy", full)
    found = measure_peaks(CPU, torch.float32, SIZES, 1024)
    assert found.bytes is None
    assert found.flops is not None


def test_peak_memory_of_the_process() -> None:
    forget_peak(CPU)  # nothing to forget, and no error
    found = peak_memory(CPU)
    if found is None:
        pytest.skip("this system does not say")
    before, of = found
    assert of == "the process since its start"
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = peak_memory(CPU)
    assert after is not None
    assert after[0] >= before
    assert after[0] > held.numel() // 2

"""Where the time went: made-up ranges on a host alone, and with a device and autograd's own thread."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from mtbert.engine.breakdown import Slice, break_down
from mtbert.engine.profile_events import slices_of
from mtbert.engine.range_tree import Label

FORWARD = Label("forward layer 0 attention", "forward", "attention")
BACKWARD = Label("backward layer 0 attention", "backward", "attention")


def of(label: Label | str, start: float, end: float, thread: int = 1, device: float = 0.0) -> Slice:
    return Slice(Label(label) if isinstance(label, str) else label, thread, start, end, device)


def test_on_a_host() -> None:
    found = break_down(
        [
            of("evaluation", 0, 50),
            of(FORWARD, 10, 40),
            of("step 7", 100, 200),
            of("forward", 110, 150),
            of("forward layer 0", 112, 148),
            of(FORWARD, 120, 140),
            of("loss", 150, 160),
            of("backward", 160, 190),
            of(BACKWARD, 165, 175),
            of(BACKWARD, 175, 180),
            of("step 8", 300, 340),
            of("forward", 300, 340),
        ],
        on_device=False,
    )
    assert found.steps == 2
    assert found.total == pytest.approx(140e-6)
    assert found.phases == pytest.approx({"forward": 80e-6, "loss": 10e-6, "backward": 30e-6})
    assert found.outside == pytest.approx({"forward": 60e-6, "loss": 10e-6, "backward": 15e-6})
    assert found.operations["attention"] == pytest.approx({"forward": 20e-6, "backward": 15e-6})
    assert found.unexplained == pytest.approx(20e-6)


def test_a_phase_in_a_phase_counts_to_the_outer_one() -> None:
    found = break_down(
        [
            *(of("step 1", 0, 100), of("loss", 0, 90), of("loss smart", 5, 85), of("forward", 10, 40)),
            *(of(FORWARD, 10, 30), of("backward", 40, 80), of(BACKWARD, 50, 60)),
        ],
        on_device=False,
    )
    assert found.phases == pytest.approx({"loss": 90e-6})
    assert found.operations["attention"] == pytest.approx({"forward": 20e-6, "backward": 10e-6})


def test_an_operation_within_an_operation_is_counted_once() -> None:
    inner = Label("forward pooling linear", "forward", "linear")
    outer = Label("forward pooling", "forward", "pooling")
    slices = [of("step 1", 0, 10), of("forward", 0, 10), of(outer, 0, 10), of(inner, 2, 8)]
    found = break_down(slices, on_device=False)
    assert found.operations["linear"] == pytest.approx({"forward": 6e-6})
    assert found.operations["pooling"] == pytest.approx({"forward": 4e-6})


def test_on_a_device_the_kernels_count_and_the_thread_of_autograd_belongs_to_the_phase_of_its_time() -> None:
    found = break_down(
        [
            of("step 1", 0, 100),
            of("forward", 0, 20),
            of(FORWARD, 5, 10, device=30.0),
            of("backward", 20, 40),
            of(BACKWARD, 25, 30, thread=2, device=45.0),
            of("", 31, 32, thread=2, device=5.0),
            of(BACKWARD, 45, 50, thread=2, device=7.0),  # in no phase: unexplained
        ],
        on_device=True,
    )
    assert found.phases == pytest.approx({"forward": 30e-6, "backward": 50e-6})
    assert found.operations["attention"] == pytest.approx({"forward": 30e-6, "backward": 45e-6})
    assert found.outside == pytest.approx({"forward": 0.0, "backward": 5e-6})
    assert found.unexplained == pytest.approx(20e-6)


def test_nothing_recorded() -> None:
    found = break_down([of("evaluation", 0, 10)], on_device=False)
    assert (found.steps, found.total, found.phases, found.unexplained) == (0, 0.0, {}, 0.0)


def event(name: str, parent: Any = None, kernels: tuple[tuple[str, float], ...] = (), **more: Any) -> Any:
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in kernels],
        thread=1,
        time_range=SimpleNamespace(start=0.0, end=1.0),
        device_type=more.get("device_type", DeviceType.CPU),
    )


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    labels = {label.name: label for label in (FORWARD, Label("forward"))}
    forward = event("forward", kernels=(("forward", 99.0),))  # its image on the device, gaps and all
    attention = event(FORWARD.name, forward, kernels=((FORWARD.name, 50.0),))
    launch = event("_Attention", attention, kernels=(("attention_kernel", 40.0), ("another", 2.0)))
    between = event("aten::add", forward, kernels=(("add", 3.0),))
    engine = event("autograd::engine::evaluate_function: AddBackward0")
    total = event("aten::add_", engine, kernels=(("add", 4.0),))
    lost = event("aten::copy_", kernels=(("copy", 5.0),))
    kernel = event("attention_kernel", device_type=DeviceType.CUDA)
    found = slices_of([forward, attention, launch, between, engine, total, lost, kernel], labels)
    assert {(each.label.name, each.device) for each in found} == {
        ("forward", 3.0),
        (FORWARD.name, 42.0),
        ("gradient sums", 4.0),
        ("", 5.0),
    }

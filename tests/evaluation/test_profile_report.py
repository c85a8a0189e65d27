"""The report's section on a profile, its short form for the console, and its figure."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mtbert.errors import DataError
from mtbert.evaluation.plots.profile_plot import profile_plot
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.profile import ProfileFacts, profile_section, profile_text, read_profile

FACTS: dict[str, Any] = {
    "first_step": 6,
    "last_step": 10,
    "trace": "trace-steps-6-10.json.gz",
    "device": "a processor",
    "clock": "host",
    "step_seconds": 0.2,
    "other_steps": {"count": 30, "median_seconds": 0.18},
    "phases": {
        "optimizer": {"seconds": 0.02, "outside_operations": 0.02},
        "forward": {"seconds": 0.06, "outside_operations": 0.01},
        "backward": {"seconds": 0.11, "outside_operations": 0.02},
    },
    "unexplained_seconds": 0.01,
    "operations": {
        "linear": {
            "seconds": {"forward": 0.03, "backward": 0.06},
            "flops": 9e9,
            "bytes": 9e8,
            "products": True,
        },
        "bias_gelu": {
            "seconds": {"forward": 0.02, "backward": 0.03},
            "flops": 1e9,
            "bytes": 1e9,
            "products": False,
        },
    },
    "peaks": {"flops": 200e9, "bytes": 40e9, "dtype": "bfloat16"},
    "peak_memory": {"bytes": 2**30, "of": "the process since its start"},
    "apart": {"evaluation": {"count": 2, "seconds": 7.5}, "checkpoint": {"count": 1, "seconds": 0.5}},
}


def changed(**changes: Any) -> ProfileFacts:
    return ProfileFacts(copy.deepcopy(FACTS) | changes)


def rows(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_section_says_where_a_step_is(tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "profile.png"
    text = profile_section(changed(), {"profile": plot}, tmp_path)
    assert "steps 6 to 10 recorded: 200.0 ms a step; 180.0 ms without a profiler (median of 30 steps)" in text
    assert (
        "70.0% of a step lies in operations, 25.0% in phases but outside of operations, 5.0% is unexplained"
        in text
    )
    # 9 GFLOP of products in 0.2 s are 45 GFLOP/s of 200.
    assert "9.0 GFLOP a step, 45.0 GFLOP/s over the whole step, 22% of the measured 200.0 GFLOP/s" in text
    assert "peak memory: 1,024 MiB, the process since its start" in text
    assert "evaluation: 2 times, 7.5 s together" in text
    assert "checkpoint: once, 0.5 s together" in text
    assert "![profile](plots/profile.png)" in text
    assert "(profile/trace-steps-6-10.json.gz)" in text
    assert rows(text, "forward") == ["60.0", "30.0", "10.0"]
    assert rows(text, "unexplained") == ["10.0", "5.0", "-"]
    # 90 ms: 100 GFLOP/s are half of the products' 200, 10 GB/s a quarter of the copy's 40.
    assert rows(text, "linear") == ["30.0", "60.0", "45.0", "100.0", "50.0", "10.0", "25.0"]
    assert rows(text, "bias_gelu") == ["20.0", "30.0", "25.0", "20.0", "-", "20.0", "50.0"]
    places = [text.index(f"| {name} |") for name in ("forward", "backward", "optimizer", "unexplained")]
    assert places == sorted(places), "phases stand in the order of a step"


def test_the_short_form(tmp_path: Path) -> None:
    many = {f"operation {k}": copy.deepcopy(FACTS["operations"]["linear"]) for k in range(20)}
    text = profile_text(changed(operations=many), tmp_path)
    assert text.count("operation ") == 1 + 8
    assert f"trace: {tmp_path / 'profile' / 'trace-steps-6-10.json.gz'}" in text


def test_a_device_s_time_and_what_could_not_be_measured(tmp_path: Path) -> None:
    operations = copy.deepcopy(FACTS["operations"])
    operations["attention"] = {
        "seconds": {"forward": 0.01, "recompute": 0.01, "backward": 0.02},
        "flops": None,
        "bytes": None,
        "products": True,
    }
    facts = changed(
        clock="device",
        step_seconds=0.02,
        operations=operations,
        peaks={"flops": None, "bytes": None, "dtype": "float32"},
        peak_memory=None,
        other_steps=None,
    )
    text = profile_section(facts, {}, tmp_path)
    assert "the device waits" in text
    assert "peak memory" not in text
    assert "without a profiler" not in text
    assert rows(text, "attention") == ["10.00", "10.00", "20.00", "200.00", "-", "-", "-", "-"]
    assert rows(text, "linear")[-3:] == ["-", "10.00", "-"]
    save(profile_plot(facts, Source("run", "commit")), tmp_path / "profile.png")


def test_the_figure(tmp_path: Path) -> None:
    figure = profile_plot(changed(), Source("run", "commit"))
    phases, operations = figure.axes
    assert [label.get_text() for label in phases.get_yticklabels()] == [
        *("forward", "backward", "optimizer", "unexplained")
    ]
    assert [label.get_text() for label in operations.get_yticklabels()] == ["linear", "bias_gelu"]
    texts = [text.get_text() for text in operations.texts]
    assert texts == ["45.0%, 50% of products", "25.0%, 50% of copy"]
    widths = {round(bar.get_width(), 6) for bar in phases.patches}
    assert {50.0, 10.0, 90.0, 20.0} <= widths
    save(figure, tmp_path / "profile.png")


def test_reading(tmp_path: Path) -> None:
    assert read_profile(tmp_path) is None
    path = tmp_path / "profile" / "profile.json"
    path.parent.mkdir()
    path.write_text(json.dumps(FACTS))
    found = read_profile(tmp_path)
    assert found is not None
    assert found.values == FACTS
    path.write_text("{")
    with pytest.raises(DataError, match=r"profile.json: is not JSON"):
        read_profile(tmp_path)

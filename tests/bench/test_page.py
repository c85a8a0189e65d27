"""The page of records: goals, tables, plots, and why a goal was missed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import records
from bench.comparison import MEMORY, Goal, summarise
from bench.measure import Alternation, Side
from bench.page import write_page

FACTS: dict[str, Any] = {
    "git": "0123456789ab",
    "created": "2026-01-02 03:04:05 +0000",
    "versions": {"torch": "2.13.0", "peft": "0.1"},
    "encoder": "minilm",
    "source": "CS224N tables",
    "tokens_per_step": 4096,
    "threads": 2,
    "load": [0.1, 0.2],
}
PROFILE = {
    "step_seconds": 1.0,
    "clock": "host",
    "phases": {},
    "unexplained_seconds": 0.0,
    "operations": {
        "linear": {
            "seconds": {"forward": 0.25, "backward": 0.5},
            "flops": 3e9,
            "bytes": 1e9,
            "products": True,
        }
    },
    "peaks": {"flops": 8e9, "bytes": 4e9, "dtype": "bfloat16"},
}


def comparison_of(
    name: str, seconds: dict[str, float], goals: list[Goal], at: dict[str, float] | None = None
) -> Any:
    """A comparison of sides that take so many seconds for 100 tokens."""
    now = 0.0

    def side(name: str) -> Side:
        def run(repeat: int) -> float:
            nonlocal now
            now += seconds[name]
            return 100.0

        place = {"at": at[name]} if at else {}
        return Side(name, run, {MEMORY: 10.0 * seconds[name], **place})

    alternation = Alternation([side(name) for name in seconds], clock=lambda: now)
    for _ in range(2):
        alternation.round()
    return summarise(name, alternation, baseline=next(iter(seconds)), goals=goals)


def test_the_page_says_what_was_met_and_what_was_missed_and_why(tmp_path: Path) -> None:
    goals = [
        Goal("mtbert", "loop", 2.0),
        Goal("mtbert", "loop", 5.0),
        Goal("mtbert", None, 120.0),
        Goal("mtbert", "loop", at_most=0.5, of="activation memory"),
        Goal("mtbert", "loop"),
    ]
    found = comparison_of("full fine-tuning", {"mtbert": 1.0, "loop": 3.0}, goals)
    assert [outcome.met for outcome in found.goals] == [True, False, False, True, None]
    found.profiles = {"mtbert": PROFILE}
    records.write(tmp_path, "Box [1]", "full fine-tuning", found.to_record(), FACTS)
    at = {"mtbert @ 512": 512.0, "loop @ 512": 512.0, "mtbert @ 1024": 1024.0}
    scaled = comparison_of("scaling: tokens of a step", dict.fromkeys(at, 1.0), [], at)
    records.write(tmp_path, "Box [1]", "scaling: tokens of a step", scaled.to_record(), FACTS)
    # What other pages show: kernels have no tokens of a step, memory no cases.
    kernels = {name: value for name, value in FACTS.items() if name != "tokens_per_step"}
    records.write(tmp_path, "Box [1]", "kernel of secrets", found.to_record(), kernels)
    records.write(tmp_path, "Box [1]", "memory of secrets", {"points": {}}, FACTS)

    text = write_page(tmp_path).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| full fine-tuning |")]
    assert [row.split(" | ")[2:] for row in rows] == [
        ["at least 2.0", "3.00 (3.00 to 3.00)", "met |"],
        ["at least 5.0", "3.00 (3.00 to 3.00)", "**missed** |"],
        ["at least 120.0", "100 (100 to 100)", "**missed** |"],
        ["at most 0.5", "0.33", "met |"],
    ]
    assert "- mtbert / loop: 3.00 (3.00 to 3.00)" in text
    assert "| linear | 750.0 | 75% | 50% | 33% |" in text  # 3 GFLOP in 0.75 s are 4 of 8 GFLOP/s
    assert "secrets" not in text
    assert "Box &#91;1&#93;" in text
    for image in ("box-1-speed.png", "box-1-scaling.png"):
        assert f"]({image})" in text
        assert (tmp_path / image).stat().st_size > 5000


def test_records_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"format": 99, "comparisons": {}}))
    with pytest.raises(ValueError, match=r"gpu\.json.*99"):
        write_page(tmp_path)

"""The time to a score: which scores count, when a goal is met, and a whole command on a small encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import records, speedrun
from bench.speedrun import Point, Run
from mtbert.errors import ConfigError, UserError


def run_of(seed: int, seconds: float, score: float) -> Run:
    points = [Point(seconds / 2, 5, score - 0.1), Point(seconds, 10, score)]
    return Run(seed, 10, points, seconds)


@pytest.mark.parametrize(
    ("seconds", "score", "comparable", "met"),
    [(19.0, 0.75, True, True), (21.0, 0.76, True, False), (5.0, 0.749, True, False), (5.0, 0.8, False, None)],
)
def test_the_medians_decide(seconds: float, score: float, comparable: bool, met: bool | None) -> None:
    runs = [run_of(0, 1.0, 0.9), run_of(1, seconds, score), run_of(2, 99.0, 0.1)]
    found = speedrun.summary(runs, 0.75, comparable=comparable)
    assert found["met"] is met
    assert found["seconds"]["median"] == seconds
    assert [run["seconds_to_target"] for run in found["runs"]] == [
        0.5,
        seconds if score >= 0.75 else None,
        None,
    ]


def test_a_torn_line_is_no_score_yet(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert speedrun.scores(metrics) == []
    metrics.write_text('{"kind": "step"}\n{"kind": "evaluation", "overall": 0.5}\n{"kind": "evalu')
    assert [line["overall"] for line in speedrun.scores(metrics)] == [0.5]


def pretend_to_train(path: Path, scores: dict[int, float], code: int = 0) -> str:
    """A program in the place of Python that writes these scores, by step, a fifth of a second apart."""
    lines = ["#!/bin/sh", 'while [ "$1" != --output ]; do shift; done', 'mkdir -p "$2"']
    for step, score in scores.items():
        line = json.dumps({"kind": "evaluation", "step": step, "overall": score})
        lines += ["sleep 0.2", f"echo '{line}' >> \"$2/metrics.jsonl\""]
    path.write_text("\n".join([*lines, "echo what went wrong", f"exit {code}"]))
    path.chmod(0o755)
    return str(path)


def test_a_short_run_is_recorded_with_its_curve_and_says_that_it_is_short(
    tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", pretend_to_train(tmp_path / "train", {2: 0.5, 3: 0.8}))
    results = tmp_path / "results"
    options = ["--data", "sample", "--device", "cpu", "--steps", "3", "--evaluations", "2", "--seeds", "2"]
    speedrun.main([*options, "--results", str(results), "--", "--model.pretrained", str(tiny_bert)])
    (path,) = results.glob("*.json")
    (found,) = records.read_file(path)["speedruns"].values()
    for run in found["runs"]:
        assert [(point["step"], point["score"]) for point in run["points"]] == [(2, 0.5), (3, 0.8)]
        assert 0.2 <= run["points"][0]["seconds"] < run["seconds"] - 0.1
        assert run["seconds_to_target"] == run["seconds"]
    assert found["met"] is None
    assert (results / found["plot"]).stat().st_size > 5000
    page = (results / "README.md").read_text(encoding="utf-8")
    said = capsys.readouterr().out
    for text in (page, said):
        assert "3 of the preset's 110 steps on cpu" in text


@pytest.mark.parametrize(("scores", "code"), [({2: 0.5}, 0), ({2: 0.5, 3: 0.8}, 3), ({}, 1)])
def test_a_run_that_fails_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: dict[int, float], code: int
) -> None:
    monkeypatch.setattr(sys, "executable", pretend_to_train(tmp_path / "train", scores, code))
    with pytest.raises(UserError, match=rf"(?s)ended with {code}.*what went wrong"):
        speedrun.time_run([], 0, 3, tmp_path / "run", tmp_path / "cache")


def test_impossible_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seeds: expected at least 1, found 0"):
        speedrun.main(["--data", "sample", "--seeds", "0", "--results", str(tmp_path)])

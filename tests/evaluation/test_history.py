"""metrics.jsonl, whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtbert.errors import DataError
from mtbert.evaluation.history import read_history

STEP = {"kind": "step", "step": 10, "epoch": 0.5, "loss": {"sst": 1.5}, "lr": 1e-5, "grad_norm": 2.0}
EVALUATION = {
    "kind": "evaluation",
    "step": 20,
    "epoch": 1.0,
    "dev": {"sst": {"accuracy": 0.4}},
    "dev_loss": {"sst": 1.4},
    "score": 0.4,
}


def write(path: Path, *rows: object, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_lines_are_sorted_by_kind(tmp_path: Path) -> None:
    epochs = [
        {"kind": "epoch", "step": 20, "epoch": 1.0, "seconds": 10.0, "tokens": 1000},
        {"kind": "epoch", "step": 40, "epoch": 2.0, "seconds": 15.0, "tokens": 2500},
    ]
    later = {**STEP, "step": 30, "loss": {"para": 0.6, "sst": None}}
    history = read_history(write(tmp_path / "m", STEP, EVALUATION, epochs[0], later, epochs[1]))
    assert history.losses("sst") == ([10.0], [1.5])
    assert history.losses("para") == ([30.0], [0.6])
    assert history.dev_losses("sst") == ([20.0], [1.4])
    assert history.scores("dev", "sst", "accuracy") == ([20.0], [0.4])
    assert history.scores("train", "sst", "accuracy") == ([], [])
    assert history.column("lr") == ([10.0, 30.0], [1e-5, 1e-5])
    times = history.epoch_times()
    assert [(time.epoch, time.step, time.seconds, time.tokens) for time in times] == [
        (1.0, 20, 10.0, 1000),
        (2.0, 40, 5.0, 1500),
    ]
    assert times[1].tokens_per_second == 300.0


def test_the_best_evaluation_is_the_first_of_the_highest(tmp_path: Path) -> None:
    rows = [
        {**EVALUATION, "step": step, "score": value}
        for step, value in ((1, 0.4), (2, 0.6), (3, 0.6), (4, None))
    ]
    best = read_history(write(tmp_path / "m", *rows)).best_evaluation()
    assert best is not None
    assert best["step"] == 2
    assert read_history(write(tmp_path / "m", STEP)).best_evaluation() is None


@pytest.mark.parametrize("cut", range(1, len(json.dumps(EVALUATION)) + 1))
def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path, cut: int) -> None:
    text = json.dumps(EVALUATION)
    history = read_history(write(tmp_path / "m", STEP, tail=text[:cut]))
    assert len(history.steps) == 1
    assert len(history.evaluations) == (cut == len(text))


@pytest.mark.parametrize("tail", ["12", "1", "{}", '"a"', "\udcff"])
def test_other_heads_of_a_line_are_left_out(tmp_path: Path, tail: str) -> None:
    path = write(tmp_path / "m", STEP)
    path.write_bytes(path.read_bytes() + tail.encode("utf-8", "surrogateescape"))
    assert len(read_history(path).steps) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("garbage", "line 2 is not JSON"),
        (json.dumps(STEP)[:20], "line 2 is not JSON"),
        ("12", "line 2: expected an object"),
        ('{"kind": "other", "step": 1}', "line 2: expected an object"),
        ('{"kind": "step"}', "line 2: expected an object"),
    ],
)
def test_garbage_elsewhere_is_an_error_that_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(STEP), line, json.dumps(STEP)]) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_history(path)
    assert str(path) in str(caught.value)


def test_a_last_line_with_its_end_is_no_cut_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_history(write(tmp_path / "m", STEP, tail=json.dumps(STEP)[:20] + "\n"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: not found"):
        read_history(tmp_path / "metrics.jsonl")


def test_an_empty_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_history(write(tmp_path / "m")).steps == []

"""Runs beside each other, and seeds summarised."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from mtbert.compare import main
from mtbert.errors import ConfigError, DataError
from mtbert.evaluation.comparison import compare_runs, config_differences
from mtbert.evaluation.metrics import overall, score
from mtbert.evaluation.predictions import Predictions, read_outputs
from mtbert.evaluation.run import read_run
from mtbert.evaluation.seeds import summarise_seeds, write_seeds
from mtbert.tasks.registry import TASKS


def headline_of(folder: Path, name: str) -> float:
    entry = read_outputs(folder / "predictions" / f"{name}-dev.jsonl", TASKS[name], "dev")
    assert entry.labels is not None
    return score(TASKS[name], entry.labels, entry.outputs).headline


def test_a_better_run_is_found_and_an_equal_one_is_not(make_run) -> None:
    base, better, equal = make_run("base"), make_run("better", skill=1.3, seed=1), make_run("equal", seed=2)
    found = compare_runs([base, better, equal], TASKS)
    real, null = found.differences
    assert real["overall"].low > 0
    assert real["sst"].value == pytest.approx(headline_of(better, "sst") - headline_of(base, "sst"))
    assert null["overall"].low < 0 < null["overall"].high
    assert null["overall"].share > 0.05
    assert found.intervals[0]["sts"].value == pytest.approx(headline_of(base, "sts"))


def test_the_command(make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run("one|run", config={"optim": {"lr": 1e-4}})
    second = make_run("other_run", names=("para", "sts", "sst", "cfimdb"), seed=1)
    main([str(first), str(second), "--output", str(tmp_path / "out"), "--resamples", "200"])
    printed = capsys.readouterr().out
    assert "Differences from one|run (paired bootstrap):" in printed
    assert str(tmp_path / "out" / "compare.md") in printed
    assert "CFIMDB" not in printed
    page = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert "| configuration | one\\|run | other\\_run |" in page
    assert "| optim.lr | 0.0001 | 5e-05 |" in page
    assert "| optim.weight\\_decay | - | 0.01 |" in page
    assert "output" not in page
    for name in ("metrics", "losses", "differences"):
        assert f"({name}.png)" in page
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_the_same_name_are_told_apart(make_run) -> None:
    first, second = make_run("a/run"), make_run("b/run", seed=1)
    for folder in (first, second):
        text = (folder / "run.json").read_text().replace('"name": "a/run"', '"name": "run"')
        (folder / "run.json").write_text(text.replace('"name": "b/run"', '"name": "run"'))
    assert compare_runs([first, second], TASKS).names == (str(first), str(second))
    assert len(set(compare_runs([first, first], TASKS).names)) == 2


def test_a_run_against_itself(make_run) -> None:
    folder = make_run("run")
    found = compare_runs([folder, folder], TASKS)
    assert all(entry.value == 0 and entry.share == 1.0 for entry in found.differences[0].values())
    assert found.config == {}


def test_a_run_of_several_seeds_carries_its_experiments_name(
    make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_run("minilm/seed-12", info={"name": "seed-12"})
    assert read_run(folder).name == "minilm/seed-12"
    monkeypatch.chdir(folder)
    assert read_run(Path()).name == "minilm/seed-12"
    assert read_run(make_run("minilm/seed-best", info={"name": "seed-best"})).name == "seed-best"
    assert read_run(make_run("minilm/seed-1", info={"name": "renamed"})).name == "renamed"


def test_the_folder_of_several_seeds_names_one_of_them(make_run) -> None:
    base, first = make_run("base"), make_run("minilm/seed-3")
    make_run("minilm/seed-4")
    parent = first.parent
    (parent / "config.yaml").write_text("seed: 3\nseeds: 2\n")
    message = re.escape(f"{parent}: holds the runs of 2 seeds") + ".*" + re.escape(f"such as {first}") + "$"
    with pytest.raises(ConfigError, match=message):
        compare_runs([base, parent], TASKS)
    (parent / "config.yaml").write_text("seeds: 1\n")
    with pytest.raises(ConfigError, match=r"run\.json is missing"):
        read_run(parent)


def test_what_cannot_be_compared_is_refused(make_run, tmp_path: Path) -> None:
    base = make_run("base")
    with pytest.raises(ConfigError, match="at least two runs, found 1"):
        compare_runs([base], TASKS)
    with pytest.raises(ConfigError, match=r"run\.json is missing"):
        compare_runs([base, tmp_path], TASKS)
    unfinished = make_run("unfinished", predicted=False)
    with pytest.raises(
        DataError, match=r"unfinished: has no dev predictions of sst, para, sts.*not finished"
    ):
        compare_runs([base, unfinished], TASKS)
    with pytest.raises(ConfigError, match="no task in common"):
        compare_runs([base, make_run("film", names=("cfimdb",))], TASKS)
    small = Predictions("sst", "dev", ("x", "y"), np.array([0, 1]), np.eye(5)[:2])
    other = make_run("other", predictions={"sst": small})
    with pytest.raises(DataError, match=r"base and .*other: sst \(dev\): .* 1101 and 2, 0 of them shared"):
        compare_runs([base, other], TASKS)


def test_only_differing_keys_are_shown() -> None:
    first = {"a": 1, "b": {"c": [1, 2], "d": None}, "output": "x", "only": {}}
    second = {"a": 1, "b": {"c": [1, 3]}, "output": "y", "e": {"f": True}}
    assert config_differences([first, second]) == {
        "b.c": ([1, 2], [1, 3]),
        "only": ({}, None),
        "e.f": (None, True),
    }


def test_seeds_are_summarised(make_run, tmp_path: Path) -> None:
    folders = [make_run(f"seed-{seed}", seed=seed) for seed in range(3)]
    summary = write_seeds(tmp_path, folders)
    metrics = {metric.name: metric for metric in summary.metrics}
    values = [headline_of(folder, "sst") for folder in folders]
    assert metrics["sst accuracy"].values == pytest.approx(values)
    assert metrics["sst accuracy"].mean == pytest.approx(statistics.mean(values))
    assert metrics["sst accuracy"].deviation == pytest.approx(np.std(values, ddof=1))
    joint = []
    for folder in folders:
        scores = {}
        for name in ("sst", "para", "sts"):
            entry = read_outputs(folder / "predictions" / f"{name}-dev.jsonl", TASKS[name], "dev")
            assert entry.labels is not None
            scores[name] = score(TASKS[name], entry.labels, entry.outputs)
        joint.append(overall(scores))
    assert metrics["overall"].values == pytest.approx(joint)
    page = (tmp_path / "seeds.md").read_text(encoding="utf-8")
    assert page.startswith("# 3 seeds\n")
    assert f"| overall | {np.mean(joint):.4f} | {np.std(joint, ddof=1):.4f} |" in page
    assert summary.runs == ("seed-0", "seed-1", "seed-2")
    assert "seed-2" in summary.to_text().splitlines()[0]


def test_one_seed_has_no_deviation_and_other_tasks_are_refused(make_run) -> None:
    first = make_run("seed-0")
    assert summarise_seeds([first]).metrics[0].deviation is None
    with pytest.raises(DataError, match=r"film: trained \['cfimdb'\], the runs before it"):
        summarise_seeds([first, make_run("film", names=("cfimdb",))])
    with pytest.raises(ConfigError, match="no runs"):
        summarise_seeds([])

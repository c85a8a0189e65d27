"""The halves of dev tables, and what is reported of runs that chose on one of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mtbert.data.tables import read_table
from mtbert.errors import DataError
from mtbert.evaluation.bootstrap import intervals, paired_differences
from mtbert.evaluation.comparison import compare_runs, write_comparison
from mtbert.evaluation.halves import report_part, selection_half
from mtbert.evaluation.metrics import overall, score
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.report import run_results, write_report
from mtbert.evaluation.results import results_table
from mtbert.evaluation.run import read_run
from mtbert.evaluation.seeds import summarise_seeds
from mtbert.tasks.registry import TASKS

HALF = {"evaluation": {"selection": "half"}}
TRIO = ("sst", "para", "sts")


def ids_of(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [f"{number:016x}" for number in generator.integers(0, 2**63, count)]


def test_the_lower_hashes_of_each_class_choose() -> None:
    ids = ids_of(12)
    labels = np.array([0, 1, 1, 0, 1, 1, 0, 1, 0, 1, 0, 1])  # 5 and 7: one gives a smaller, one a larger half

    def digest(name: str) -> bytes:
        return hashlib.blake2b(name.encode(), digest_size=8, person=b"mtbert halves").digest()

    expected: set[str] = set()
    for label, size in ((0, 2), (1, 4)):
        members = [name for name, own in zip(ids, labels, strict=True) if own == label]
        expected |= set(sorted(members, key=digest)[:size])
    chosen = selection_half(ids, labels)
    assert chosen.dtype == bool
    assert {name for name, inside in zip(ids, chosen, strict=True) if inside} == expected


@pytest.mark.parametrize("kind", ["classes", "scores", "none"])
@pytest.mark.parametrize("count", [0, 1, 2, 99, 1000])
def test_halves_are_stratified_and_know_no_order(kind: str, count: int) -> None:
    ids, generator = ids_of(count), np.random.default_rng(1)
    labels = {
        "classes": generator.integers(0, 5, count),
        "scores": np.round(generator.uniform(0, 5, count), 1),
        "none": None,
    }[kind]
    chosen = selection_half(ids, labels)
    assert chosen.sum() == count // 2
    order = generator.permutation(count)
    again = selection_half([ids[place] for place in order], None if labels is None else labels[order])
    assert (again == chosen[order]).all()
    if kind == "classes" and count:
        for label in range(5):
            inside = chosen[labels == label]
            assert abs(inside.sum() - len(inside) / 2) <= 0.5
    if kind == "scores" and count == 1000:
        for low in np.arange(0, 5, 0.5):
            inside = chosen[(labels >= low) & (labels < low + 0.5)]
            assert abs(inside.sum() - len(inside) / 2) <= 1
    if kind == "none" and count == 1000:  # no regularity of the ids in the halves
        assert abs(chosen[np.argsort(ids)][:500].sum() - 250) < 50


def test_a_few_more_rows_leave_the_halves_as_they_are() -> None:
    ids, labels = ids_of(1000), np.arange(1000) % 5
    before = selection_half(ids[:990], labels[:990])
    after = selection_half(ids, labels)[:990]
    assert (before != after).sum() <= 20


def test_rows_of_one_id_stay_together_and_constant_scores_are_one_stratum() -> None:
    ids = [name for name in ids_of(50) for _ in range(2)]
    chosen = selection_half(ids, np.full(100, 2.5))
    assert (chosen[::2] == chosen[1::2]).all()
    assert chosen.sum() == 50


def test_the_report_part_is_what_did_not_choose() -> None:
    ids, labels = tuple(ids_of(101)), np.arange(101) % 2
    whole = Predictions("para", "dev", ids, labels, np.arange(101.0)[:, None])
    part = report_part(whole)
    places = np.flatnonzero(~selection_half(ids, labels))
    assert len(part) == 51
    assert part.ids == tuple(ids[place] for place in places)
    assert part.labels is not None
    assert part.labels.tolist() == (places % 2).tolist()
    assert part.outputs[:, 0].tolist() == places.tolist()


def test_the_real_tables(shared_data: Path) -> None:
    for name in (*TRIO, "cfimdb"):
        task = TASKS[name]
        table = read_table(shared_data / task.files["dev"], name, "dev", task.layout)
        assert table.labels is not None
        chosen = selection_half(table.ids, table.labels)
        assert chosen.sum() == len(table) // 2
        if name == "sts":
            assert table.labels[chosen].mean() == pytest.approx(table.labels[~chosen].mean(), abs=0.05)
        else:
            halves = [Counter(table.labels[side].tolist()) for side in (chosen, ~chosen)]
            assert all(abs(halves[0][label] - halves[1][label]) <= 1 for label in halves[0])


def expected_scores(folder: Path, names: tuple[str, ...] = TRIO) -> tuple[dict, dict]:
    """Scores of the report half and of all of dev."""
    run = read_run(folder)
    found: tuple[dict, dict] = ({}, {})
    for name in names:
        entry = run.predictions(TASKS[name])
        assert entry.labels is not None
        held = ~selection_half(entry.ids, entry.labels)
        found[0][name] = score(TASKS[name], entry.labels[held], entry.outputs[held])
        found[1][name] = score(TASKS[name], entry.labels, entry.outputs)
    return found


def test_results_are_of_the_report_half(make_run) -> None:
    run = read_run(make_run("run", config=HALF))
    held, whole = expected_scores(run.folder)
    predictions = run.all_predictions(TASKS)
    outcome = run_results(run, {name: TASKS[name] for name in TRIO}, predictions)
    assert outcome.scores == held
    assert outcome.overall == overall(held)
    assert {name: outcome.whole[name].value for name in TRIO} == {n: s.headline for n, s in whole.items()}
    parts = {name: report_part(entry) for name, entry in predictions.items()}
    assert outcome.intervals == intervals(TASKS, parts)
    lines = results_table(outcome).splitlines()
    assert "report half of dev" in lines[0]
    assert "all of dev (optimistic)" in lines[0]
    cells = re.split(r"\s{2,}", next(line for line in lines if line.startswith("overall")))
    assert cells[1] == f"{overall(held):.3f}"
    assert cells[3] == f"{overall(whole):.3f}"
    plain = read_run(make_run("plain"))
    outcome = run_results(plain, {"sst": TASKS["sst"]}, {"sst": predictions["sst"]})
    assert outcome.scores["sst"] == whole["sst"]
    assert not outcome.whole
    assert "optimistic" not in results_table(outcome)


def test_the_report_says_which_half_is_which(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.evaluation.report.write_plots", lambda *arguments: {})
    folder = make_run("run", config=HALF, names=("sst", "sts"))
    held, whole = expected_scores(folder, ("sst", "sts"))
    page = write_report(folder, TASKS).read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| SST-5 sentiment | accuracy |"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[2] == f"{held['sst'].headline:.3f}"
    assert cells[4] == f"{whole['sst'].headline:.3f}"
    assert cells[-1] == f"{held['sst'].examples:,}"
    assert f"Accuracy {held['sst'].accuracy:.3f}" in page
    assert "`all of dev` counts it, and is optimistic" in page
    assert "Here dev is the selection half of dev" in page
    plain = write_report(make_run("plain", names=("sst",)), TASKS).read_text(encoding="utf-8")
    assert "optimistic" not in plain
    assert "half" not in plain


def test_seeds_are_summarised_on_the_report_half(make_run) -> None:
    folders = [make_run(f"seed-{seed}", seed=seed, config=HALF) for seed in range(3)]
    pairs = [expected_scores(folder) for folder in folders]
    summary = summarise_seeds(folders)
    metrics = {metric.name: metric for metric in summary.metrics}
    whole = {metric.name: metric for metric in summary.whole}
    assert metrics["overall"].values == pytest.approx([overall(held) for held, _ in pairs])
    assert metrics["sts Spearman"].values == pytest.approx([held["sts"].spearman for held, _ in pairs])
    assert whole["overall"].values == pytest.approx([overall(everything) for _, everything in pairs])
    assert list(whole) == ["sst accuracy", "para accuracy", "sts Pearson", "overall", "mean"]
    page = summary.to_markdown()
    assert "| metric on report half of dev | mean |" in page
    assert f"| overall, all of dev (optimistic) | {whole['overall'].mean:.4f} |" in page
    assert "took no part" in page
    with pytest.raises(DataError, match=r"other: evaluation\.selection is not that of the runs before it"):
        summarise_seeds([folders[0], make_run("other")])


def test_runs_are_compared_on_the_report_half_when_all_have_it(
    make_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtbert.evaluation.comparison.save", lambda figure, path: path)
    first, second = make_run("first", config=HALF), make_run("second", seed=1, skill=1.1, config=HALF)
    plain = make_run("plain", seed=1, skill=1.1)
    entries = [read_run(folder).all_predictions(TASKS) for folder in (first, second)]
    parts = [{name: report_part(entry) for name, entry in run.items()} for run in entries]
    found = compare_runs([first, second], TASKS)
    assert found.differences[0] == paired_differences(TASKS, *parts)
    assert found.whole[0] == paired_differences(TASKS, *entries)
    assert found.intervals[0] == intervals(TASKS, parts[0])
    page = write_comparison(found, tmp_path / "halves").read_text(encoding="utf-8")
    assert "| run | metric on report half of dev | difference |" in page
    assert f"{found.whole[0]['overall'].value:+.3f} (" in page
    assert "Checkpoints were chosen on the other half" in page

    mixed = compare_runs([first, plain], TASKS)
    assert mixed.differences[0] == paired_differences(
        TASKS, entries[0], read_run(plain).all_predictions(TASKS)
    )
    assert not mixed.whole
    page = write_comparison(mixed, tmp_path / "mixed").read_text(encoding="utf-8")
    assert "| run | metric on dev | difference |" in page
    assert "Some of the runs chose their checkpoint on all of dev" in page

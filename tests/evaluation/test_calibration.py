"""Calibration, ordered classes and swapped pairs, beside scikit-learn and beside plain loops."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, cohen_kappa_score, log_loss
from sklearn.metrics import mean_absolute_error as sklearn_mae

from mtbert.data.tables import ClassLabels, TableLayout
from mtbert.errors import ConfigError, DataError, NonFiniteError
from mtbert.evaluation.assessment import assess
from mtbert.evaluation.bootstrap import ordinal_intervals
from mtbert.evaluation.calibration import calibration, calibration_report, fitted_temperature
from mtbert.evaluation.halves import selection_half
from mtbert.evaluation.metrics import score
from mtbert.evaluation.predictions import Predictions, predictions_from_outputs, probabilities
from mtbert.evaluation.report import write_report
from mtbert.evaluation.swaps import SwapConsistency, read_swaps, swap_consistency, write_swaps
from mtbert.tasks.registry import TASKS, Task

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]


def drawn(task: Task, count: int, sharpness: float = 1.0, seed: int = 0) -> Predictions:
    """Labels drawn from the probabilities of logits; the outputs are these logits times `sharpness`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(count, task.outputs)) * 1.5
    chances = probabilities(task, logits)
    labels = (generator.random((count, 1)) > chances.cumsum(axis=1)).sum(axis=1).clip(max=task.classes - 1)
    return Predictions(task.name, "dev", tuple(map(str, range(count))), labels, logits * sharpness)


@pytest.mark.parametrize("task", [SST, PARA], ids=["classification", "binary"])
@pytest.mark.parametrize("missing", [False, True], ids=["all classes", "a class missing"])
def test_scores_are_those_of_scikit_learn(task: Task, missing: bool) -> None:
    entry = drawn(task, 700, 2.0)
    labels, outputs = entry.labels, entry.outputs
    assert labels is not None
    if missing:
        labels, outputs = labels[labels != 1], outputs[labels != 1]
    chances = probabilities(task, outputs)
    found = calibration(task, labels, outputs)
    classes = list(range(task.classes))
    if task.classes == 2:
        brier = float(np.mean((chances[:, 1] - labels) ** 2))
        assert brier == pytest.approx(brier_score_loss(labels, chances[:, 1], pos_label=1))
    else:
        brier = float(((chances - np.eye(task.classes)[labels]) ** 2).sum(axis=1).mean())
    assert found.brier == pytest.approx(brier)
    assert found.nll == pytest.approx(log_loss(labels, chances, labels=classes))
    confidences, hits = chances.max(axis=1), chances.argmax(axis=1) == labels
    gap = 0.0
    for k in range(15):
        inside = (confidences > k / 15) & (confidences <= (k + 1) / 15)
        if inside.any():
            gap += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    assert found.ece == pytest.approx(gap)
    assert sum(each.examples for each in found.bins) == len(labels)


@pytest.mark.parametrize("task", [SST, PARA], ids=["classification", "binary"])
def test_the_temperature_undoes_what_made_the_model_too_sure(task: Task) -> None:
    entry = drawn(task, 6000, 3.0)
    report = calibration_report(task, entry)
    assert report is not None
    assert report.tempered is not None
    assert report.tempered.temperature == pytest.approx(3.0, rel=0.1)
    assert report.tempered.before.ece > 0.1 > 0.04 > report.tempered.after.ece
    assert report.tempered.after.nll < report.tempered.before.nll
    assert report.whole.examples == 6000
    # What the fit never saw decides nothing: and it is what before and after are of.
    held_out = ~selection_half(entry.ids, entry.labels)
    assert report.tempered.before.examples == held_out.sum()
    other = entry.outputs.copy()
    other[held_out] = 0.0
    again = calibration_report(task, replace(entry, outputs=other))
    assert again is not None
    assert again.tempered is not None
    assert again.tempered.temperature == report.tempered.temperature
    halved = calibration_report(task, entry, halved=True)
    assert halved is not None
    assert halved.whole == report.tempered.before


def test_extreme_and_missing_predictions() -> None:
    labels = np.array([0, 0, 0])
    sure = calibration(SST, labels, np.array([[1000.0, 0, 0, 0, 0]] * 3))
    assert (sure.ece, sure.brier, sure.nll) == (0.0, 0.0, 0.0)
    wrong = calibration(SST, labels, np.array([[0.0, 1000, 0, 0, 0]] * 3))
    assert (wrong.ece, wrong.brier, wrong.nll) == (1.0, 2.0, 1000.0)
    constant = score(SST, labels, np.array([[1000.0, 0, 0, 0, 0]] * 3))
    assert (constant.mean_absolute_error, constant.quadratic_kappa) == (0.0, 0.0)
    assert 0.05 <= fitted_temperature(SST, labels, np.array([[9.0, 0, 0, 0, 0]] * 3)) < 1.0
    nothing = Predictions("sst", "own", (), np.zeros(0, np.int64), np.zeros((0, 5)))
    assert calibration_report(SST, nothing) is None
    assert calibration(SST, np.zeros(0, np.int64), np.zeros((0, 5))).examples == 0
    assert (
        assess(SST, nothing, resamples=10).to_json()["ordinal_intervals"]["quadratic kappa"]["value"] == 0.0
    )
    single = Predictions("sst", "own", ("a",), np.array([2]), np.zeros((1, 5)))
    report = calibration_report(SST, single)
    assert report is not None
    assert report.tempered is None
    assert "all examples" in assess(SST, single, resamples=10).to_text()
    assert (
        calibration_report(STS, Predictions("sts", "own", ("a",), np.array([2.0]), np.ones((1, 1)))) is None
    )
    with pytest.raises(NonFiniteError):
        calibration(SST, labels, np.full((3, 5), np.nan))


@pytest.mark.parametrize("classes", [range(5), (1, 3)], ids=["all classes", "two of five"])
def test_ordered_scores_are_those_of_scikit_learn(classes: object) -> None:
    entry = drawn(SST, 400)
    labels = np.random.default_rng(1).choice(list(classes), 400)  # type: ignore[call-overload]
    predicted = predictions_from_outputs(SST, entry.outputs)
    found = score(SST, labels, entry.outputs)
    assert found.mean_absolute_error == pytest.approx(sklearn_mae(labels, predicted))
    assert found.quadratic_kappa == pytest.approx(cohen_kappa_score(labels, predicted, weights="quadratic"))
    ends = ordinal_intervals(SST, replace(entry, labels=labels), resamples=300)
    generator = np.random.default_rng(2)
    resampled = []
    for _ in range(300):
        rows = generator.integers(0, 400, 400)
        resampled.append(cohen_kappa_score(labels[rows], predicted[rows], weights="quadratic"))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert ends["quadratic kappa"].value == pytest.approx(found.quadratic_kappa)
    assert ends["quadratic kappa"].low == pytest.approx(low, abs=0.03)
    assert ends["quadratic kappa"].high == pytest.approx(high, abs=0.03)
    error = ends["mean absolute error"]
    assert error.low < error.value < error.high


def test_only_scales_of_three_classes_are_ordered() -> None:
    assert [name for name, task in TASKS.items() if task.ordered] == ["sst"]
    assert score(PARA, np.array([0, 1]), np.zeros((2, 1))).quadratic_kappa is None
    with pytest.raises(ConfigError, match="ordered needs a classification of 3 or more classes"):
        Task("x", "X", "classification", TableLayout(("s",), "l", ClassLabels(2)), ordered=True)


def test_swapped_pairs_are_compared_by_class_and_by_score() -> None:
    first, second = np.array([[2.0], [-1.0], [0.5]]), np.array([[2.0], [1.0], [0.4]])
    found = swap_consistency(PARA, first, second, of=9)
    chances = [1 / (1 + np.exp(-each)) for each in (first, second)]
    assert (found.changed, found.pairs, found.of, found.changed_share) == (1, 3, 9, pytest.approx(1 / 3))
    assert found.largest_difference == pytest.approx(np.abs(chances[0] - chances[1]).max())
    scores = swap_consistency(STS, first, second)
    assert scores.changed is None
    assert scores.mean_difference == pytest.approx(2.1 / 3)
    assert SwapConsistency.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert swap_consistency(STS, np.zeros((0, 1)), np.zeros((0, 1))).mean_difference == 0.0


def test_the_report_says_it_shortly(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.evaluation.report.write_plots", lambda *arguments: {})
    folder = make_run("run", names=("sst", "para", "sts", "cfimdb"))
    swaps = {name: SwapConsistency(TASKS[name].kind, 50, 100, None, 0.01, 0.2) for name in ("sts",)}
    swaps["para"] = SwapConsistency("binary", 50, 100, 5, 0.03, 0.4)
    write_swaps(folder, swaps)
    page = write_report(folder, TASKS).read_text(encoding="utf-8")
    assert page.count("### Calibration") == 3
    assert page.count("The classes have an order") == 1
    assert "10.0% of a seeded sample of 50 of 100 pairs get another class" in page
    assert (
        "the scores of a seeded sample of 50 of 100 pairs differ by 0.010 on average and 0.200 at most"
        in page
    )
    for text in (
        "[1]",
        "[" * 100_000,
        '{"sts": 1}',
        json.dumps({"sts": swaps["sts"].to_json() | {"pairs": "many"}}),
    ):
        (folder / "swapped-pairs.json").write_text(text)
        with pytest.raises(DataError, match=r"swapped-pairs\.json: "):
            read_swaps(folder)

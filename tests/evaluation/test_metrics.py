"""Scores against scikit-learn and SciPy."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle
from sklearn.dummy import DummyClassifier

from mtbert.errors import NonFiniteError
from mtbert.evaluation.baselines import baselines, baselines_from_histograms, label_histogram
from mtbert.evaluation.metrics import (
    ConstantScoresWarning,
    TaskScores,
    aggregates,
    mean,
    overall,
    score,
    selection_score,
)
from mtbert.tasks.registry import TASKS

SST, PARA, STS = TASKS["sst"], TASKS["para"], TASKS["sts"]


def scores_of(kind: str, value: float) -> TaskScores:
    if kind == "similarity":
        return TaskScores(kind=kind, examples=1, pearson=value)
    return TaskScores(kind=kind, examples=1, accuracy=value)


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Class 4 is never a label, class 0 never a prediction.
    labels = generator.integers(0, 4, 300)
    outputs = generator.normal(size=(300, 5)) + 1.5 * np.eye(5)[labels]
    outputs[:, 0] = -100.0
    found = score(SST, labels, outputs)
    predicted = outputs.argmax(axis=1)
    assert found.accuracy == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-12)
    assert found.macro_f1 == pytest.approx(oracle.f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert np.array_equal(found.confusion, oracle.confusion_matrix(labels, predicted, labels=range(5)))
    expected = oracle.precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for place, row in enumerate(found.classes):
        assert [row.precision, row.recall, row.f1] == pytest.approx(
            [column[place] for column in expected[:3]]
        )
        assert row.support == expected[3][place]
        assert row.predicted == int((predicted == place).sum())
    assert [row.name for row in found.classes] == list(SST.class_names)


def test_macro_f1_leaves_out_classes_that_never_occur() -> None:
    labels = np.array([0, 1, 1])
    outputs = np.eye(5)[[0, 1, 0]]
    expected = oracle.f1_score(labels, [0, 1, 0], average="macro")
    assert score(SST, labels, outputs).macro_f1 == pytest.approx(expected)


def test_binary_thresholds_the_logit_at_zero() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    outputs = np.array([[-0.1], [0.0], [0.0], [1e-9], [5.0]])
    found = score(PARA, labels, outputs)
    assert found.confusion == ((2, 0), (1, 2))
    assert found.accuracy == pytest.approx(0.8)
    assert (found.headline, found.second) == (found.accuracy, found.macro_f1)


def test_similarity_equals_scipy() -> None:
    generator = np.random.default_rng(3)
    labels = np.round(generator.uniform(0, 5, 200), 1)
    predicted = (labels + generator.normal(size=200)).round(1)  # ties matter to Spearman
    found = score(STS, labels, predicted[:, None])
    assert found.pearson == pytest.approx(stats.pearsonr(labels, predicted).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(labels, predicted).statistic, abs=1e-12)
    assert found.mse == pytest.approx(oracle.mean_squared_error(labels, predicted))
    assert (found.headline, found.second) == (found.pearson, found.spearman)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1e9])
def test_constant_predictions_have_pearson_zero_and_a_warning(value: float) -> None:
    labels = np.linspace(0, 5, 57)
    with pytest.warns(ConstantScoresWarning, match="sts: all 57 predictions are the same"):
        found = score(STS, labels, np.full((57, 1), value))
    assert found.pearson == 0.0
    assert found.spearman == 0.0


def test_constant_labels_have_pearson_zero_and_a_warning() -> None:
    with pytest.warns(ConstantScoresWarning, match="labels"):
        assert score(STS, np.full(4, 2.0), np.arange(4.0)[:, None]).pearson == 0.0


def test_nearly_constant_predictions_are_still_scored() -> None:
    labels = np.linspace(0, 5, 50)
    predicted = 2.5 + 1e-6 * labels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score(STS, labels, predicted[:, None]).pearson == pytest.approx(1.0, abs=1e-6)


def test_no_examples_and_one_example() -> None:
    empty = score(SST, np.zeros(0, dtype=np.int64), np.zeros((0, 5)))
    assert (empty.examples, empty.accuracy, empty.macro_f1) == (0, 0.0, 0.0)
    single = score(PARA, np.array([1]), np.array([[2.0]]))
    assert (single.examples, single.accuracy, single.macro_f1) == (1, 1.0, 1.0)
    for count in (0, 1):
        with pytest.warns(ConstantScoresWarning):
            found = score(STS, np.ones(count), np.ones((count, 1)))
        assert (found.pearson, found.spearman, found.mse) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_are_counted(bad: float) -> None:
    outputs = np.zeros((10, 5))
    outputs[4, 2] = outputs[7, 0] = bad
    with pytest.raises(NonFiniteError, match=r"sst: .* 2 of 10 examples .*first is example 4"):
        score(SST, np.zeros(10, dtype=np.int64), outputs)


def test_shapes_and_labels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, 5\]"):
        score(SST, np.zeros(3, dtype=np.int64), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="labels"):
        score(SST, np.zeros(2, dtype=np.int64), np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"0\.\.4"):
        score(SST, np.array([0, 5]), np.zeros((2, 5)))


def test_scores_survive_json() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 5, 40)
    for task, truth, outputs in (
        (SST, labels, generator.normal(size=(40, 5))),
        (STS, labels.astype(float), generator.normal(size=(40, 1))),
    ):
        found = score(task, truth, outputs)
        assert TaskScores.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "pearson" not in score(SST, labels, generator.normal(size=(40, 5))).to_json()


def test_overall_and_mean_by_their_formulas() -> None:
    scores = {
        "sst": scores_of("classification", 0.5),
        "para": scores_of("binary", 0.8),
        "sts": scores_of("similarity", 0.6),
    }
    assert overall(scores) == pytest.approx((0.5 + 0.8 + (0.6 + 1) / 2) / 3)
    assert mean(scores) == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert selection_score(scores) == overall(scores)
    scores["cfimdb"] = scores_of("classification", 0.1)
    assert selection_score(scores) == overall(scores)
    del scores["para"]
    assert aggregates(scores) == {
        "overall": None,
        "mean": None,
        "score": pytest.approx((0.5 + 0.6 + 0.1) / 3),
    }
    with pytest.raises(ValueError, match="no task"):
        selection_score({})


def test_baselines_equal_scikit_learns_dummy() -> None:
    generator = np.random.default_rng(1)
    train, dev = generator.choice(5, 500, p=[0.1, 0.2, 0.4, 0.2, 0.1]), generator.integers(0, 5, 100)
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((500, 1)), train)
    found = baselines(SST, train, dev)
    assert found.majority == pytest.approx(dummy.score(np.zeros((100, 1)), dev))
    assert found.chance == pytest.approx(0.2)
    assert baselines(PARA, np.array([0, 0, 1]), np.array([1, 1, 1, 0])).majority == pytest.approx(0.25)
    scores = baselines(STS, np.array([1.0, 4.0]), np.array([2.0, 3.0]))
    assert (scores.chance, scores.majority) == (0.0, 0.0)
    assert baselines_from_histograms(SST, None, None).majority is None


def test_label_histograms() -> None:
    assert label_histogram(SST, np.array([0, 4, 4])) == {"counts": [1, 0, 0, 0, 2]}
    found = label_histogram(STS, np.array([0.0, 0.4, 0.5, 5.0]))
    assert found is not None
    assert found["counts"] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert found["edges"][0] == 0.0
    assert found["edges"][-1] == 5.0
    assert found["mean"] == pytest.approx(1.475)
    assert label_histogram(SST, None) is None
    assert json.dumps(found)


def test_a_task_without_class_names_uses_numbers() -> None:
    found = score(replace(SST, class_names=()), np.array([0]), np.eye(5)[[0]])
    assert [row.name for row in found.classes] == ["0", "1", "2", "3", "4"]

"""The course's files byte for byte, and the JSON lines there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mtbert.errors import DataError, NonFiniteError
from mtbert.evaluation.predictions import (
    Predictions,
    course_file_names,
    predictions_from_outputs,
    probabilities,
    read_outputs,
    write_course_file,
    write_outputs,
    write_prediction_files,
)
from mtbert.evaluation.worst import worst_errors
from mtbert.tasks.registry import TASKS

SST, PARA, STS, CFIMDB = (TASKS[name] for name in ("sst", "para", "sts", "cfimdb"))
IDS = ["9844a320e93a7a2619e034a3a", "86d5b52677dfa79afad549ded"]


def test_sentiment_files_of_the_course(tmp_path: Path) -> None:
    for task in (SST, CFIMDB):
        path = write_course_file(tmp_path / "out.csv", task, IDS, np.array([0, 1]))
        assert path.read_bytes() == (
            b"id \t Predicted_Sentiment \n9844a320e93a7a2619e034a3a , 0 \n86d5b52677dfa79afad549ded , 1 \n"
        )


def test_paraphrase_file_of_the_course(tmp_path: Path) -> None:
    path = write_course_file(tmp_path / "out.csv", PARA, IDS, np.array([0, 1]))
    assert path.read_bytes() == (
        b"id \t Predicted_Is_Paraphrase \n"
        b"9844a320e93a7a2619e034a3a , 0.0 \n"
        b"86d5b52677dfa79afad549ded , 1.0 \n"
    )


def test_similarity_file_of_the_course(tmp_path: Path) -> None:
    # As numpy.float32 prints in an f-string: the 32-bit value with a double's digits.
    predictions = predictions_from_outputs(STS, np.array([[1.9924936294555664], [4.94091796875]]))
    path = write_course_file(tmp_path / "out.csv", STS, IDS, predictions)
    assert path.read_bytes() == (
        b"id \t Predicted_Similiary \n"
        b"9844a320e93a7a2619e034a3a , 1.9924936294555664 \n"
        b"86d5b52677dfa79afad549ded , 4.94091796875 \n"
    )
    write_course_file(path, STS, IDS, np.array([0.1, 2.0]))
    assert path.read_text().splitlines()[1:] == [
        f"{IDS[0]} , {np.float32(0.1)} ",
        f"{IDS[1]} , {np.float32(2.0)} ",
    ]
    assert "0.10000000149011612" in path.read_text()


def test_names_of_the_courses_files() -> None:
    assert course_file_names(STS, "test") == ["sts-test-output.csv"]
    assert course_file_names(SST, "dev") == ["sst-dev-output.csv"]
    assert course_file_names(SST, "dev", "last-linear-layer") == [
        "sst-dev-output.csv",
        "last-linear-layer-sst-dev-out.csv",
    ]
    assert course_file_names(CFIMDB, "test", "full-model") == ["full-model-cfimdb-test-out.csv"]
    assert course_file_names(CFIMDB, "test") == []
    assert course_file_names(PARA, "dev", "full-model") == ["para-dev-output.csv"]


def test_all_files_of_a_task(tmp_path: Path) -> None:
    predictions = Predictions("sst", "dev", tuple(IDS), np.array([3, 4]), np.eye(5)[[3, 1]])
    paths = write_prediction_files(tmp_path, SST, predictions, mode="full-model")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "predictions/sst-dev.jsonl",
        "predictions/sst-dev-output.csv",
        "predictions/full-model-sst-dev-out.csv",
    ]
    assert paths[1].read_bytes() == paths[2].read_bytes()
    assert paths[1].read_text().endswith(f"{IDS[1]} , 1 \n")
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == sorted(p.name for p in paths)


@pytest.mark.parametrize("name", ["sst", "para", "sts"])
@pytest.mark.parametrize("labelled", [True, False])
def test_json_lines_there_and_back(tmp_path: Path, name: str, labelled: bool) -> None:
    task, generator = TASKS[name], np.random.default_rng(0)
    outputs = generator.normal(size=(50, task.outputs)).astype(np.float32)
    labels = None
    if labelled:
        labels = generator.uniform(0, 5, 50) if name == "sts" else generator.integers(0, task.classes, 50)
    ids = tuple(f'é "quoted"\u2028 {i}' for i in range(50))  # U+2028 ends a line for str.splitlines
    path = write_outputs(tmp_path / "x.jsonl", task, Predictions(name, "test", ids, labels, outputs))
    found = read_outputs(path, task, "test")
    assert found.ids == ids
    assert np.array_equal(found.outputs, outputs.astype(np.float64))
    if labels is None:
        assert found.labels is None
    else:
        assert found.labels is not None
        assert found.labels.dtype == labels.dtype
        assert np.array_equal(found.labels, labels)
    row = json.loads(path.read_text().split("\n")[7])
    assert row["prediction"] == predictions_from_outputs(task, outputs)[7]


def test_empty_predictions(tmp_path: Path) -> None:
    empty = Predictions("sst", "dev", (), np.zeros(0, dtype=np.int64), np.zeros((0, 5)))
    found = read_outputs(write_outputs(tmp_path / "x.jsonl", SST, empty), SST, "dev")
    assert len(found) == 0
    assert found.outputs.shape == (0, 5)


GOOD = '{"id": "a", "label": 1, "prediction": 1, "outputs": [0.5]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'line 2: expected an object with "id"'),
        ('{"id": "b", "label": 1}', 'line 2: expected an object with "id"'),
        (GOOD.replace("[0.5]", "[0.5, 1]"), r'line 2: "outputs" must be 1 number'),
        (GOOD.replace("[0.5]", '["x"]'), r'line 2: "outputs" must be 1 number'),
        (GOOD.replace('"label": 1', '"label": "x"'), 'line 2: "label" must be a number'),
        (GOOD.replace('"label": 1', '"label": 7'), "line 2: label 7 is not one of the 2 classes"),
        (GOOD.replace('"label": 1', '"label": null'), "1 of 2 lines have no label"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "para-dev.jsonl"
    path.write_text(GOOD + "\n" + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_outputs(path, PARA, "dev")
    assert str(path) in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: there are no predictions for para"):
        read_outputs(tmp_path / "nothing.jsonl", PARA, "dev")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read"):
        read_outputs(tmp_path / "b.jsonl", PARA, "dev")


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    broken = Predictions("sts", "dev", tuple(IDS), None, np.array([[1.0], [np.nan]]))
    with pytest.raises(NonFiniteError, match="1 of 2"):
        write_prediction_files(tmp_path, STS, broken)
    assert not (tmp_path / "predictions").exists()


def test_ids_and_predictions_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 ids for 1 predictions"):
        write_course_file(tmp_path / "x", SST, IDS, np.array([1]))


def test_probabilities() -> None:
    found = probabilities(SST, np.array([[1000.0, 1000.0, -1000.0, 0.0, 0.0]]))
    assert found == pytest.approx(np.array([[0.5, 0.5, 0.0, 0.0, 0.0]]))
    assert probabilities(PARA, np.array([[np.log(3.0)]])) == pytest.approx(np.array([[0.25, 0.75]]))


def test_worst_errors_of_classes_are_the_most_confident_ones() -> None:
    outputs = np.array([[3.0], [-9.0], [1.0], [5.0]])
    found = worst_errors(
        PARA, Predictions("para", "dev", ("a", "b", "c", "d"), np.array([0, 1, 0, 1]), outputs), 2
    )
    assert [(row.id, row.index, row.label, row.prediction) for row in found] == [
        ("b", 1, 1, 0),
        ("a", 0, 0, 1),
    ]
    assert found[0].badness == pytest.approx(1 / (1 + np.exp(-9)))


def test_worst_errors_of_scores_are_the_largest_ones() -> None:
    entry = Predictions(
        "sts", "dev", ("a", "b", "c"), np.array([1.0, 2.0, 5.0]), np.array([[1.0], [4.0], [1.0]])
    )
    assert [(row.id, row.badness) for row in worst_errors(STS, entry)] == [("c", 4.0), ("b", 2.0)]
    assert worst_errors(STS, Predictions("sts", "test", ("a",), None, np.array([[1.0]]))) == []

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from mtbert.data.hub import read_hub
from mtbert.data.tables import TableLayout
from mtbert.errors import DataError


def qqp_row(number: int, label: object = 1, **changes: object) -> dict[str, object]:
    return {"question1": f" q{number} ", "question2": f"p{number}", "label": label, "idx": number} | changes


def hub(splits: dict[str, list[dict[str, object]]], calls: list[tuple[str, ...]] | None = None):
    def load_dataset(*arguments: str) -> dict[str, list[dict[str, object]]]:
        if calls is not None:
            calls.append(arguments)
        return splits

    return load_dataset


SPLITS = {
    "train": [qqp_row(0, 0), qqp_row(1), qqp_row(2, question2=None), qqp_row(3, None)],
    "validation": [qqp_row(7, 1)],
    "test": [qqp_row(8, -1), qqp_row(9, -1)],
}


def test_columns_and_splits_are_mapped(layouts: dict[str, TableLayout]) -> None:
    calls: list[tuple[str, ...]] = []
    tables = read_hub("para", layouts["para"], loader=hub(SPLITS, calls))
    assert calls == [("nyu-mll/glue", "qqp")]
    assert list(tables) == ["train", "dev", "test"]
    train = tables["train"]
    assert train.ids == ["train-0", "train-1"]
    assert train.texts == [("q0", "p0"), ("q1", "p1")]
    assert train.labels is not None
    assert train.labels.tolist() == [0, 1]
    assert str(train.path) == "hub:nyu-mll/glue/qqp/train"
    assert [(p.line, p.reason) for p in train.problems] == [(3, "no question2"), (4, "no label")]
    assert tables["test"].labels is None
    assert tables["test"].ids == ["test-8", "test-9"]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (SPLITS | {"train": [qqp_row(0, -1)]}, "qqp/train, row 1: label is -1, expected a whole"),
        (SPLITS | {"train": [qqp_row(0, "yes")]}, "row 1: label is 'yes', expected a whole number from 0 to 1"),
        (SPLITS | {"test": [qqp_row(0, -1), qqp_row(1, 1)]}, "1 of 2 labels are withheld"),
        (SPLITS | {"train": [{"question1": "a", "label": 0, "idx": 0}]}, "no column question2; found quest"),
        (SPLITS | {"train": []}, "0 rows cannot be used, 0 can"),
        ({"train": SPLITS["train"]}, "hub:nyu-mll/glue/qqp: no split validation; found train"),
    ],
)  # fmt: skip
def test_unexpected_tables_are_errors(splits, message: str, layouts: dict[str, TableLayout]) -> None:
    with pytest.raises(DataError, match=message):
        read_hub("para", layouts["para"], loader=hub(splits))


def test_library_is_missing(monkeypatch: pytest.MonkeyPatch, layouts: dict[str, TableLayout]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets, or give a folder"):
        read_hub("sst", layouts["sst"])


def test_hub_cannot_be_reached(layouts: dict[str, TableLayout]) -> None:
    def unreachable(*arguments: str):
        raise ConnectionError("Couldn't reach the Hub\nand more")

    with pytest.raises(
        DataError, match=r"SetFit/sst5 cannot be read: ConnectionError: .* the Hub; check the"
    ):
        read_hub("sst", layouts["sst"], loader=unreachable)


def test_task_without_a_source(layouts: dict[str, TableLayout]) -> None:
    with pytest.raises(DataError, match="cfimdb is not on the hub; expected one of sst, para, sts"):
        read_hub("cfimdb", layouts["cfimdb"], loader=hub(SPLITS))


def test_copies_on_disk(tmp_path: Path, layouts: dict[str, TableLayout]) -> None:
    calls: list[tuple[str, ...]] = []
    with pytest.raises(DataError, match=r"no such folder; expected a copy of the hub's dataset nyu-mll/glue"):
        read_hub("para", layouts["para"], folder=tmp_path, loader=hub(SPLITS))
    folder = tmp_path / "nyu-mll" / "glue"
    (folder / "qqp").mkdir(parents=True)
    read_hub("para", layouts["para"], folder=tmp_path, loader=hub(SPLITS, calls))
    (folder / "README.md").touch()
    read_hub("para", layouts["para"], folder=tmp_path, loader=hub(SPLITS, calls))
    assert calls == [(str(folder / "qqp"),), (str(folder), "qqp")]


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the library datasets is not installed"
)
def test_the_library_itself_on_local_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layouts: dict[str, TableLayout]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    contents = {
        "SetFit/sst5": [("train", {"text": " Good . ", "label": 4}), ("dev", {"text": "Bad", "label": 0})],
        "nyu-mll/glue/qqp": [(s, qqp_row(1, -1 if s == "test" else 1)) for s in SPLITS],
    }
    for dataset, splits in contents.items():
        folder = tmp_path / dataset
        folder.mkdir(parents=True)
        for split, row in splits:
            (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    sst = read_hub("sst", layouts["sst"], folder=tmp_path)
    assert (sst["train"].texts, sst["dev"].texts) == ([("Good .",)], [("Bad",)])
    para = read_hub("para", layouts["para"], folder=tmp_path)
    assert para["dev"].texts == [("q1", "p1")]
    assert para["test"].labels is None

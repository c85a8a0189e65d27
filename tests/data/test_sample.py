from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from mtbert.data.overlap import normalised
from mtbert.data.sample import SIZES, synthetic_tables, write_sample
from mtbert.data.tables import TableLayout, read_folder
from mtbert.errors import DataError


@pytest.mark.parametrize("task", list(SIZES))
def test_sizes_names_and_labels(task: str, layouts: dict[str, TableLayout]) -> None:
    tables = synthetic_tables(task)
    assert {split: len(table) for split, table in tables.items()} == SIZES[task]
    for split, table in tables.items():
        assert str(table.path) == f"synthetic:{task}-{split}"
        assert all(row_id.startswith("synthetic-") for row_id in table.ids)
        assert table.duplicate_ids == 0
        assert all(len(texts) == len(layouts[task].text_columns) for texts in table.texts)
    assert tables["test"].labels is None
    for split in ("train", "dev"):
        labels = tables[split].labels
        assert labels is not None
        assert labels.dtype == layouts[task].labels.dtype
        assert all(layouts[task].labels.allows(label) for label in labels.tolist())


@pytest.mark.parametrize("task", list(SIZES))
def test_no_text_occurs_twice_in_any_split(task: str) -> None:
    texts = [normalised(t) for table in synthetic_tables(task).values() for t in table.texts]
    assert len(set(texts)) == len(texts)


def test_the_sample_never_changes() -> None:
    digest = hashlib.sha256()
    for task in SIZES:
        for table in synthetic_tables(task).values():
            digest.update(
                repr((table.texts, None if table.labels is None else table.labels.tolist())).encode()
            )
    assert digest.hexdigest() == "657124c352b1a0062076d905824ac77f899449ba88ff438ea45d5cab0b76bc55"


def test_labels_are_balanced_enough_to_learn_from() -> None:
    sst, para, sts = (synthetic_tables(task)["train"].labels for task in ("sst", "para", "sts"))
    assert sst is not None
    assert para is not None
    assert sts is not None
    assert np.bincount(sst).tolist() == [120] * 5
    assert 0.4 < para.mean() < 0.5
    assert 1.3 < sts.std() < 2.0


def test_dev_has_words_that_training_never_shows() -> None:
    tables = synthetic_tables("sst")
    words = {split: {w for t in table.texts for w in t[0].split()} for split, table in tables.items()}
    assert len(words["dev"] - words["train"]) > 10


def test_write_sample_is_read_back(tmp_path: Path, layouts: dict[str, TableLayout]) -> None:
    for task in SIZES:
        files = {split: f"{task}-{split}.csv" for split in ("train", "dev", "test")}
        write_sample(tmp_path, task, layouts[task], files)
        for split, table in read_folder(tmp_path, task, layouts[task], files).items():
            expected = synthetic_tables(task)[split]
            assert (table.ids, table.texts, table.problems) == (expected.ids, expected.texts, [])
            np.testing.assert_array_equal(table.labels, expected.labels)


def test_unknown_task() -> None:
    with pytest.raises(DataError, match="no synthetic sample for task nli; expected one of sst, para"):
        synthetic_tables("nli")

"""The real CS224N tables, where they are at hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mtbert.data.overlap import train_dev_overlap
from mtbert.data.tables import Table, TableLayout, read_folder
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.tasks import TASKS

NAMES = {"sst": "ids-sst", "para": "quora", "sts": "sts", "cfimdb": "ids-cfimdb"}
ROWS = {
    "sst": (8544, 1101, 2210),
    "para": (22757, 10010, 10204),
    "sts": (6040, 863, 1725),
    "cfimdb": (1707, 245, 488),
}


@pytest.fixture(scope="module")
def tables(shared_data: Path, layouts: dict[str, TableLayout]) -> dict[str, dict[str, Table]]:
    files = {"train": "train.csv", "dev": "dev.csv", "test": "test-student.csv"}
    return {
        task: read_folder(shared_data, task, layouts[task], {s: f"{name}-{f}" for s, f in files.items()})
        for task, name in NAMES.items()
    }


def test_every_row_is_read_or_reported(tables: dict[str, dict[str, Table]]) -> None:
    for task, splits in tables.items():
        counts = tuple(len(table) + len(table.problems) for table in splits.values())
        assert counts == ROWS[task]
        assert splits["test"].labels is None
        assert [table.duplicate_ids for table in splits.values()] == [0, 0, 0]


def test_the_known_problems_and_no_others(tables: dict[str, dict[str, Table]]) -> None:
    problems = [
        (p.path.name, p.line, p.reason) for s in tables.values() for t in s.values() for p in t.problems
    ]
    assert problems == [
        ("quora-dev.csv", 1292, "no is_duplicate"),
        ("quora-dev.csv", 7041, "no sentence2, no is_duplicate"),
    ]


def test_labels(tables: dict[str, dict[str, Table]]) -> None:
    for task, classes in (("sst", 5), ("para", 2), ("cfimdb", 2)):
        labels = tables[task]["train"].labels
        assert labels is not None
        assert np.unique(labels).tolist() == list(range(classes))
    scores = tables["sts"]["train"].labels
    assert scores is not None
    assert (scores.min(), scores.max()) == (0.0, 5.0)


def test_texts_are_those_of_the_csv_module(shared_data: Path, tables: dict[str, dict[str, Table]]) -> None:
    for task, splits in tables.items():
        columns = TASKS[task].layout.text_columns
        for split, table in splits.items():
            with (shared_data / TASKS[task].files[split]).open(encoding="utf-8", newline="") as file:
                rows = {row["id"].strip(): row for row in csv.DictReader(file, delimiter="\t")}
            for identity, texts in zip(table.ids, table.texts, strict=True):
                assert texts == tuple(rows[identity][column].strip() for column in columns)


def test_markup_and_short_texts_are_kept(tables: dict[str, dict[str, Table]]) -> None:
    assert any("[math]" in text for texts in tables["para"]["train"].texts for text in texts)
    assert any('""' in text for texts in tables["para"]["test"].texts for text in texts)
    assert sum("<br />" in texts[0] for texts in tables["cfimdb"]["train"].texts) > 500
    assert min(len(text) for texts in tables["para"]["dev"].texts for text in texts) == 1


def test_known_overlap(tables: dict[str, dict[str, Table]]) -> None:
    counts = {task: len(train_dev_overlap(s["train"], s["dev"])) for task, s in tables.items()}
    assert counts == {"sst": 2, "para": 0, "sts": 16, "cfimdb": 0}


def test_tokens_are_those_of_the_pretrained_model(tables: dict[str, dict[str, Table]], minilm: Path) -> None:
    from tokenizers import Tokenizer

    table = tables["sst"]["dev"]
    tokenised = tokenise(table, Tokeniser.from_folder(minilm))
    plain = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    for number, texts in enumerate(table.texts[:200]):
        ids = tokenised.tokens[tokenised.offsets[number] : tokenised.offsets[number + 1]]
        assert [tokenised.cls_id, *ids.tolist(), tokenised.sep_id] == plain.encode(texts[0]).ids

"""Augmenters without a server."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mtbert.augmentation.draws import Draws
from mtbert.augmentation.offline import change_case, change_punctuation, drop_words
from mtbert.data.tables import read_table
from mtbert.errors import ConfigError
from mtbert.tasks.registry import get_task

from .conftest import Augment, read

TEXT = "It is n't slow , and I never liked it less : not once !"


def test_changes_keep_what_they_promise() -> None:
    for number in range(200):
        draws = Draws("test", number)
        assert change_case(TEXT, draws).lower() == TEXT.lower()
        marked = change_punctuation(TEXT, draws)
        assert marked != TEXT
        assert [c for c in marked if c.isalpha()] == [c for c in TEXT if c.isalpha()]
        shorter = drop_words(TEXT, draws).split()
        assert 0 < len(shorter) < len(TEXT.split())
        assert not Counter(shorter) - Counter(TEXT.split())
        assert {"n't", "never", "not"} <= set(shorter), "negations carry the label"
    assert drop_words("Not good", Draws(1)) == "Not good"
    assert drop_words("not never no", Draws(1)) == "not never no"


def test_classes_become_even_and_the_same_seed_makes_the_same_table(
    augment: Augment, tables: Path, tmp_path: Path
) -> None:
    assert augment("sst", "--equalise", "--offline=case,punctuation,word-dropout") == 0
    first = (tmp_path / "new.csv").read_bytes()
    task = get_task("sst")
    new, train = (
        read_table(path, "sst", "train", task.layout)
        for path in (tmp_path / "new.csv", tables / "ids-sst-train.csv")
    )
    assert new.labels is not None
    assert train.labels is not None
    assert (Counter(new.labels.tolist()) + Counter(train.labels.tolist())) == dict.fromkeys(range(5), 12)
    assert not set(new.ids) & set(train.ids)
    labels = dict(zip(train.ids, train.labels.tolist(), strict=True))
    rows = read(tmp_path / "new.csv")
    assert len({row["sentence"] for row in rows}) == len(rows) == 27
    assert [labels[row["source"]] for row in rows] == new.labels.tolist()
    assert augment("sst", "--equalise", "--offline=case,punctuation,word-dropout", "--overwrite") == 0
    assert (tmp_path / "new.csv").read_bytes() == first
    assert (
        augment("sst", "--equalise", "--offline=case,punctuation,word-dropout", "--overwrite", "--seed=1")
        == 0
    )
    assert (tmp_path / "new.csv").read_bytes() != first


def test_swapped_pairs(augment: Augment, tables: Path, tmp_path: Path) -> None:
    assert augment("para", "--multiply=2", "--offline=swap") == 0
    train = {row["id"]: row for row in read(tables / "quora-train.csv")}
    rows = read(tmp_path / "new.csv")
    assert len(rows) == len(train)
    for row in rows:
        source = train[row["source"]]
        assert (row["sentence1"], row["sentence2"]) == (source["sentence2"], source["sentence1"])
        assert float(row["is_duplicate"]) == float(source["is_duplicate"])


def test_what_is_refused(augment: Augment, tmp_path: Path) -> None:
    for options, message in (
        (("--equalise", "--offline=swap"), "swap needs pairs"),
        (("--equalise", "--offline=shuffle"), "expected some of case, punctuation"),
        (("--equalise", "--offline=case,case"), "twice"),
        (("--clean", "--offline=case"), "repairs need a language model"),
        (("--equalise", "--offline=case", "--model=m"), "--model: would have no effect"),
        (("--equalise", "--offline=case", "--rewrite=one"), "--rewrite: would have no effect"),
        (("--clean", "--shots=1"), "--shots: would have no effect"),
        (("--equalise", "--base-url=ftp://x"), "--base-url"),
        (("--equalise", "--base-url=http://user:secret@x/v1"), "OPENAI_API_KEY"),
        (("--equalise", "--extra-body=[1]"), "a JSON object"),
        (("--equalise", '--extra-body={"n": 2}'), "n cannot be given there"),
        (("--equalise", "--shortest=2"), "--shortest"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            augment("sst", *options)
        assert "secret" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_there_is_not_replaced(augment: Augment, tables: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("mine")
    with pytest.raises(ConfigError, match="--overwrite"):
        augment("sst", "--equalise", "--offline=case")
    with pytest.raises(ConfigError, match="never replaced"):
        augment(
            "sst", "--equalise", "--offline=case", "--overwrite", f"--output={tables / 'ids-sst-train.csv'}"
        )

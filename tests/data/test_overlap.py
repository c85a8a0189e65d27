from __future__ import annotations

from pathlib import Path

from mtbert.data.overlap import Overlap, train_dev_overlap
from mtbert.data.tables import Table


def table(split: str, texts: list[tuple[str, ...]]) -> Table:
    count = len(texts)
    return Table(
        "task", split, Path(split), [str(i) for i in range(count)], texts, None, list(range(2, count + 2))
    )


def test_pairs_are_compared_without_case_space_and_order() -> None:
    train = table("train", [("A man  runs.", "A dog sleeps."), ("x", "y"), ("Y", "X"), ("Straße", "z")])
    dev = table(
        "dev", [("a dog SLEEPS.", " a man\truns."), ("y", "x"), ("x", "x"), ("z", "STRASSE"), ("y", "x")]
    )
    assert train_dev_overlap(train, dev) == [
        Overlap(2, 2, dev.texts[0]),
        Overlap(3, 3, dev.texts[1]),
        Overlap(5, 5, dev.texts[3]),
        Overlap(3, 6, dev.texts[4]),
    ]


def test_no_overlap() -> None:
    assert train_dev_overlap(table("train", [("a",)]), table("dev", [("b",)])) == []

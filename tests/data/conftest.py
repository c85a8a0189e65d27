"""Fixtures of the data tests: a small WordPiece tokeniser, and tokenised tables made of given token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mtbert.data.tables import ClassLabels, ScoreLabels, Table, TableLayout
from mtbert.data.tokenisation import TokenisedTable, Tokeniser

CLS, SEP = 101, 102

MakeTokenised = Callable[..., TokenisedTable]


@pytest.fixture(scope="session")
def tokeniser(tiny_bert: Path) -> Tokeniser:
    return Tokeniser.from_folder(tiny_bert)


@pytest.fixture(scope="session")
def layouts() -> dict[str, TableLayout]:
    pair = ("sentence1", "sentence2")
    return {
        "sst": TableLayout(("sentence",), "sentiment", ClassLabels(5)),
        "para": TableLayout(pair, "is_duplicate", ClassLabels(2)),
        "sts": TableLayout(pair, "similarity", ScoreLabels(0.0, 5.0)),
        "cfimdb": TableLayout(("sentence",), "sentiment", ClassLabels(2)),
    }


@pytest.fixture(scope="session")
def make_tokenised() -> MakeTokenised:
    def make(examples: Sequence[Sequence[Sequence[int]]], labels: np.ndarray | None = None) -> TokenisedTable:
        """A tokenised table whose example i has the texts `examples[i]`, each a list of token ids."""
        texts = [text for example in examples for text in example]
        count = len(examples)
        table = Table(
            task="task",
            split="train",
            path=Path("train.csv"),
            ids=[f"id{i}" for i in range(count)],
            texts=[tuple("text" for _ in example) for example in examples],
            labels=labels,
            lines=list(range(2, count + 2)),
        )
        tokens = np.array([token for text in texts for token in text], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
        return TokenisedTable(table, tokens, offsets, len(examples[0]), CLS, SEP)

    return make

"""The examples of one task as rows of tokens: which tokens are kept, and how long every example is."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from mtbert.data.tokenisation import TokenisedTable
from mtbert.errors import ConfigError

Form = Literal["single", "pair-rows", "cross"]
Truncate = Literal["head", "tail", "both"]

MAX_POSITIONS = 4096
"""Positions are the low 12 bits of a dropout row."""


class TaskData:
    """A tokenised table seen as the rows that the encoder reads.

    `form` says how an example becomes rows:
      * "single":    `[CLS] a [SEP]`
      * "pair-rows": two rows, `[CLS] a [SEP]` and `[CLS] b [SEP]`
      * "cross":     one row, `[CLS] a [SEP] b [SEP]` with token types 0 and 1

    A row has at most `max_length` tokens, special tokens included. `truncate` says which tokens of a longer
    text are kept: the "head", the "tail", or "both" in equal parts (the longer half from the head), as Sun et
    al. 2019, "How to Fine-Tune BERT for Text Classification?", found best for reviews. A "cross" row is
    shortened by taking tokens from the longer text ("longest first", with the same result as in
    `tokenizers`). `n_truncated` counts the shortened examples.

    Attributes: `labels` (int64 or float64 [n], or None), `ids` (n strings), `lengths` int64 [n]: the
    tokens of an example over all of its rows.
    """

    def __init__(
        self,
        name: str,
        tokenised: TokenisedTable,
        *,
        form: Form,
        max_length: int,
        truncate: Truncate = "head",
    ) -> None:
        """Raises ConfigError for a form or a length that the table cannot have."""
        if form not in get_args(Form):
            raise ConfigError(f"task {name}: form is {form!r}, expected one of {', '.join(get_args(Form))}")
        if truncate not in get_args(Truncate):
            raise ConfigError(
                f"task {name}: truncate is {truncate!r}, expected one of {', '.join(get_args(Truncate))}"
            )
        texts = 1 if form == "single" else 2
        if tokenised.texts_per_example != texts:
            raise ConfigError(
                f"task {name}: form {form!r} needs {texts} text(s) per example, "
                f"found {tokenised.texts_per_example}"
            )
        specials = 3 if form == "cross" else 2
        least = specials + (2 if form == "cross" else 1)
        if not least <= max_length <= MAX_POSITIONS:
            raise ConfigError(f"task {name}: max_length is {max_length}, expected {least} to {MAX_POSITIONS}")
        self.name = name
        self.form: Form = form
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.table = tokenised.table
        self.ids = tokenised.table.ids
        self.labels = tokenised.table.labels
        self.tokens = tokenised.tokens
        self.cls_id = tokenised.cls_id
        self.sep_id = tokenised.sep_id
        self.rows_per_example = 2 if form == "pair-rows" else 1
        self.texts_per_example = texts

        # Of text t, which begins at starts[t] in the stream, the first heads[t] tokens are kept, then
        # skips[t] are left out, and the rest of its sizes[t] kept tokens follows.
        starts = np.asarray(tokenised.offsets[:-1]).reshape(-1, texts)
        full = np.diff(tokenised.offsets).reshape(-1, texts)
        sizes = (
            _shorten_pair(full, max_length - specials)
            if form == "cross"
            else np.minimum(full, max_length - specials)
        )
        self.heads = {"head": sizes, "tail": np.zeros_like(sizes), "both": sizes - sizes // 2}[truncate]
        self.starts = starts
        self.sizes = sizes
        self.skips = full - sizes
        self.lengths: np.ndarray = sizes.sum(axis=1) + specials * self.rows_per_example
        self.n_truncated = int((self.skips > 0).any(axis=1).sum())

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ids)

    def rows(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The rows of one example as (ids, type ids), int32 each."""
        texts = []
        for start, size, head, skip in zip(
            self.starts[index], self.sizes[index], self.heads[index], self.skips[index], strict=True
        ):
            texts.append(
                np.concatenate(
                    [
                        self.tokens[start : start + head],
                        self.tokens[start + head + skip : start + size + skip],
                    ]
                )
            )
        cls, sep = np.array([self.cls_id], dtype=np.int32), np.array([self.sep_id], dtype=np.int32)
        if self.form == "cross":
            a, b = texts
            types = np.repeat(np.array([0, 1], dtype=np.int32), [len(a) + 2, len(b) + 1])
            return [(np.concatenate([cls, a, sep, b, sep]), types)]
        rows = [np.concatenate([cls, text, sep]) for text in texts]
        return [(row, np.zeros(len(row), dtype=np.int32)) for row in rows]


def _shorten_pair(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Sizes [n, 2] after taking tokens from the longer text until both fit into `budget`."""
    first, second = sizes[:, 0], sizes[:, 1]
    half = budget // 2
    short = np.where(
        (first <= second)[:, None],
        np.stack([np.minimum(first, half), budget - np.minimum(first, half)], axis=1),
        np.stack([budget - np.minimum(second, half), np.minimum(second, half)], axis=1),
    )
    return np.where((first + second > budget)[:, None], short, sizes)

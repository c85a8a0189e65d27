"""The examples of one task as rows of tokens: which tokens are kept, and how long every example is."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from mtbert.data.tables import Table
from mtbert.data.tokenisation import TokenisedTable
from mtbert.errors import ConfigError

Form = Literal["single", "pair-rows", "cross"]
Truncate = Literal["head", "tail", "both"]

MAX_POSITIONS = 4096
"""Positions are the low 12 bits of a dropout row."""


class TaskData:
    """Texts of a tokenised table seen as the rows that the encoder reads.

    `form` says how an example becomes rows:
      * "single":    `[CLS] a [SEP]`
      * "pair-rows": two rows, `[CLS] a [SEP]` and `[CLS] b [SEP]`
      * "cross":     one row, `[CLS] a [SEP] b [SEP]` with token types 0 and 1
      * "rows":      k rows, each of any text of the table (see `of_texts`)

    A row has at most `max_length` tokens, special tokens included. `truncate` says which tokens of a longer
    text are kept: the "head", the "tail", or "both" in equal parts (the longer half from the head), as Sun et
    al. 2019, "How to Fine-Tune BERT for Text Classification?", found best for reviews. A "cross" row is
    shortened by taking tokens from the longer text ("longest first", with the same result as in
    `tokenizers`). `n_truncated` counts the shortened examples.

    Attributes: `name` (of the stream of rows), `task` (whose gradient the rows belong to; the same as `name` for a
    task's own examples), `table` (the examples as they were read), `labels` (int64 or float64 [n], or None), `ids`
    (n strings), `lengths` int64 [n]: the tokens of an example over all of its rows.
    """

    def __init__(
        self,
        name: str,
        tokenised: TokenisedTable,
        *,
        form: Form,
        max_length: int,
        truncate: Truncate = "head",
        task: str | None = None,
    ) -> None:
        """The examples of the table. Raises ConfigError for a form or a length that it cannot have."""
        if form not in get_args(Form):
            raise ConfigError(f"task {name}: form is {form!r}, expected one of {', '.join(get_args(Form))}")
        texts = 1 if form == "single" else 2
        if tokenised.texts_per_example != texts:
            raise ConfigError(
                f"task {name}: form {form!r} needs {texts} text(s) per example, "
                f"found {tokenised.texts_per_example}"
            )
        numbers = np.arange(len(tokenised.offsets) - 1).reshape(-1, texts)
        self._lay_out(name, task or name, tokenised, tokenised.table, numbers, form, max_length, truncate)

    @classmethod
    def of_texts(
        cls,
        name: str,
        tokenised: TokenisedTable,
        texts: np.ndarray,
        *,
        task: str,
        max_length: int,
        truncate: Truncate = "head",
        labels: np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ) -> TaskData:
        """Examples of k rows each, `[CLS] text [SEP]`: row j of example i is text number texts[i, j] of the table.

        texts: int64 [n, k]. Text t of the table's example e has the number e * texts_per_example + t; behind the first
        row, -1 stands for an empty text. ids: by default those of the table's examples that the first texts are from.
        """
        texts = np.asarray(texts, dtype=np.int64)
        count, per_example = len(tokenised.offsets) - 1, tokenised.texts_per_example
        if texts.ndim != 2 or (texts < -1).any() or (texts[:, :1] < 0).any() or (texts >= count).any():
            raise ValueError(f"{name}: expected text numbers [n, k] below {count}")
        source = tokenised.table
        examples = (texts[:, 0] // per_example).tolist()
        words = [text for example in source.texts for text in example] + [""]
        table = replace(
            source,
            ids=[source.ids[example] for example in examples] if ids is None else list(ids),
            texts=[tuple(words[number] for number in row) for row in texts.tolist()],
            labels=labels,
            lines=[source.lines[example] for example in examples],
            files=source.files_of(examples),
        )
        data = cls.__new__(cls)
        data._lay_out(name, task, tokenised, table, texts, "rows", max_length, truncate)
        return data

    def _lay_out(
        self,
        name: str,
        task: str,
        tokenised: TokenisedTable,
        table: Table,
        texts: np.ndarray,
        form: Form | Literal["rows"],
        max_length: int,
        truncate: Truncate,
    ) -> None:
        if truncate not in get_args(Truncate):
            raise ConfigError(
                f"task {task}: truncate is {truncate!r}, expected one of {', '.join(get_args(Truncate))}"
            )
        specials = 3 if form == "cross" else 2
        least = specials + (2 if form == "cross" else 1)
        if not least <= max_length <= MAX_POSITIONS:
            raise ConfigError(f"task {task}: max_length is {max_length}, expected {least} to {MAX_POSITIONS}")
        self.name = name
        self.task = task
        self.form = form
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.table = table
        self.ids = table.ids
        self.labels = table.labels
        self.tokens = tokenised.tokens
        self.cls_id = tokenised.cls_id
        self.sep_id = tokenised.sep_id
        self.rows_per_example = 1 if form == "cross" else texts.shape[1]

        # Of text t, which begins at starts[t] in the stream, the first heads[t] tokens are kept, then
        # skips[t] are left out, and the rest of its sizes[t] kept tokens follows.
        self.starts = np.append(tokenised.offsets[:-1], 0)[texts]
        full = np.append(np.diff(tokenised.offsets), 0)[texts]
        sizes = (
            _shorten_pair(full, max_length - specials)
            if form == "cross"
            else np.minimum(full, max_length - specials)
        )
        self.heads = {"head": sizes, "tail": np.zeros_like(sizes), "both": sizes - sizes // 2}[truncate]
        self.sizes = sizes
        self.skips = full - sizes
        self.lengths: np.ndarray = sizes.sum(axis=1) + specials * self.rows_per_example
        self.n_truncated = int((self.skips > 0).any(axis=1).sum())

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.ids)

    def rows_apart(self, rows: np.ndarray) -> TaskData:
        """These rows, each as an example of its own without a label: row j of example i has the number i * k + j.

        rows: int64 [m]. k is `rows_per_example`.
        """
        apart = copy.copy(self)
        count = len(self) * self.rows_per_example
        for name in ("starts", "sizes", "heads", "skips"):
            setattr(apart, name, getattr(self, name).reshape(count, -1)[rows])
        specials = 3 if self.form == "cross" else 2
        examples = (rows // self.rows_per_example).tolist()
        apart.table = replace(
            self.table,
            ids=[self.table.ids[example] for example in examples],
            texts=[self.table.texts[example] for example in examples],
            labels=None,
            lines=[self.table.lines[example] for example in examples],
            files=self.table.files_of(examples),
        )
        apart.ids, apart.labels, apart.rows_per_example = apart.table.ids, None, 1
        apart.lengths = apart.sizes.sum(axis=1) + specials
        apart.n_truncated = int((apart.skips > 0).any(axis=1).sum())
        return apart

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

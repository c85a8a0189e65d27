from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbert.data.dataset import TaskData
from mtbert.data.packing import Request, pack
from mtbert.data.tables import Table
from mtbert.data.tokenisation import Tokeniser, tokenise
from mtbert.errors import ConfigError

CLS, SEP = 101, 102


def kept(text: list[int], size: int, truncate: str) -> list[int]:
    """What stays of a text, token by token."""
    text = list(text)
    while len(text) > size:
        if truncate == "head":
            text.pop()
        elif truncate == "tail":
            text.pop(0)
        else:
            text.pop(-(-size // 2))
    return text


def kept_pair(a: list[int], b: list[int], budget: int, truncate: str) -> tuple[list[int], list[int]]:
    sizes = [len(a), len(b)]
    shorter = int(len(b) < len(a))
    while sum(sizes) > budget:
        sizes[shorter if sizes[0] == sizes[1] else int(sizes[1] > sizes[0])] -= 1
    return kept(a, sizes[0], truncate), kept(b, sizes[1], truncate)


def lengths_of(sizes: list[tuple[int, int]]) -> list[list[list[int]]]:
    """Texts of the given sizes with tokens that are all different."""
    flat = np.split(
        np.arange(1000, 1000 + sum(map(sum, sizes))), np.cumsum([s for pair in sizes for s in pair])[:-1]
    )
    texts = [part.tolist() for part in flat]
    return [texts[2 * i : 2 * i + 2] for i in range(len(sizes))]


sizes = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=6)
truncations = st.sampled_from(["head", "tail", "both"])


@given(sizes, st.integers(3, 20), truncations)
def test_single_and_pair_rows(
    make_tokenised, sizes: list[tuple[int, int]], max_length: int, truncate
) -> None:
    examples = lengths_of(sizes)
    pairs = TaskData(
        "t", make_tokenised(examples), form="pair-rows", max_length=max_length, truncate=truncate
    )
    first = [[a] for a, _ in examples]
    singles = TaskData("t", make_tokenised(first), form="single", max_length=max_length, truncate=truncate)
    for i, (a, b) in enumerate(examples):
        rows = [[CLS, *kept(text, max_length - 2, truncate), SEP] for text in (a, b)]
        assert [ids.tolist() for ids, _ in pairs.rows(i)] == rows
        assert [types.tolist() for _, types in pairs.rows(i)] == [[0] * len(row) for row in rows]
        assert [ids.tolist() for ids, _ in singles.rows(i)] == rows[:1]
        assert pairs.lengths[i] == sum(map(len, rows))
        assert singles.lengths[i] == len(rows[0])
    assert pairs.n_truncated == sum(max(pair) > max_length - 2 for pair in sizes)
    assert singles.n_truncated == sum(a > max_length - 2 for a, _ in sizes)


@given(sizes, st.integers(5, 24), truncations)
def test_cross_rows(make_tokenised, sizes: list[tuple[int, int]], max_length: int, truncate) -> None:
    examples = lengths_of(sizes)
    data = TaskData("t", make_tokenised(examples), form="cross", max_length=max_length, truncate=truncate)
    for i, (a, b) in enumerate(examples):
        a, b = kept_pair(a, b, max_length - 3, truncate)
        ((ids, types),) = data.rows(i)
        assert ids.tolist() == [CLS, *a, SEP, *b, SEP]
        assert types.tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert ids.dtype == types.dtype == np.int32
        assert data.lengths[i] == len(ids) <= max_length
    assert data.n_truncated == sum(a + b > max_length - 3 for a, b in sizes)


def test_cross_rows_are_those_of_the_library(tokeniser: Tokeniser, tiny_bert: Path) -> None:
    """Longest first, as `tokenizers` shortens pairs."""
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    texts = [("a good film " * 4, "no"), ("no", "a good film " * 4), ("a b c d e f g h", "i j k l m n o p")]
    texts += [(b, a) for a, b in texts] + [("a b c d", "i j k l m n o p"), ("a b c d e", "f g h i")]
    table = Table("t", "train", Path("t"), list("12345678"), texts, None, list(range(8)))
    for max_length in range(5, 13):
        library.enable_truncation(max_length, strategy="longest_first")
        data = TaskData("t", tokenise(table, tokeniser), form="cross", max_length=max_length)
        for i, pair in enumerate(texts):
            ((ids, types),) = data.rows(i)
            expected = library.encode(*pair)
            assert ids.tolist() == expected.ids
            assert types.tolist() == expected.type_ids


@given(st.data(), st.integers(3, 20), truncations)
def test_rows_of_any_texts(make_tokenised, data: st.DataObject, max_length: int, truncate) -> None:
    examples = lengths_of(data.draw(sizes))
    texts = [text for example in examples for text in example]
    width = data.draw(st.integers(1, 4))
    number = st.integers(0, len(texts) - 1)
    later = st.integers(-1, len(texts) - 1)
    chosen = data.draw(
        st.lists(st.tuples(number, *[later] * (width - 1)), min_size=1, max_size=5).map(np.array)
    )
    found = TaskData.of_texts(
        "t/extra", make_tokenised(examples), chosen, task="t", max_length=max_length, truncate=truncate
    )
    assert (found.name, found.task, found.rows_per_example, len(found)) == (
        "t/extra",
        "t",
        width,
        len(chosen),
    )
    expected = [
        [[CLS, *(kept(texts[n], max_length - 2, truncate) if n >= 0 else []), SEP] for n in row]
        for row in chosen.tolist()
    ]
    assert [[ids.tolist() for ids, _ in found.rows(i)] for i in range(len(found))] == expected
    assert found.lengths.tolist() == [sum(map(len, rows)) for rows in expected]
    batch = pack([Request(found, np.arange(len(found)), 0, 1.0)])
    assert batch.input_ids.tolist() == [token for rows in expected for row in rows for token in row]
    assert batch.cu_seqlens.diff().tolist() == [len(row) for rows in expected for row in rows]
    assert (batch.segments[0].stream, batch.segments[0].task) == ("t/extra", "t")


def test_examples_of_texts_are_named_after_those_of_the_table(make_tokenised) -> None:
    table = make_tokenised([[[1], [2]], [[3], [4]]], np.array([0.5, 1.5]))
    found = TaskData.of_texts("t/x", table, np.array([[3, 0], [1, -1], [2, 2]]), task="t", max_length=9)
    assert found.ids == ["id1", "id0", "id1"]
    assert found.table.lines == [3, 2, 3]
    assert found.table.texts == [("text", "text"), ("text", ""), ("text", "text")]
    assert found.labels is None
    named = TaskData.of_texts(
        "t/x",
        table,
        np.array([[0], [1]]),
        task="t",
        max_length=9,
        labels=np.array([7, 8]),
        ids=["a", "b"],
    )
    assert (named.ids, named.labels.tolist()) == (["a", "b"], [7, 8])  # type: ignore[union-attr]


@pytest.mark.parametrize("texts", [[[4]], [[0, -2]], [[-1, 0]], [0, 1]])
def test_texts_that_are_not_there(make_tokenised, texts: list) -> None:
    with pytest.raises(ValueError, match=r"t/x: expected text numbers \[n, k\] below 4"):
        TaskData.of_texts("t/x", make_tokenised([[[1], [2]]] * 2), np.array(texts), task="t", max_length=9)


def test_a_task_of_its_own_or_of_another_name(make_tokenised) -> None:
    table = make_tokenised([[[1]]])
    assert TaskData("sst", table, form="single", max_length=9).task == "sst"
    assert TaskData("sst/more", table, form="single", max_length=9, task="sst").task == "sst"


def test_both_keeps_the_longer_half_of_the_head(make_tokenised) -> None:
    data = TaskData("t", make_tokenised([[list(range(10))]]), form="single", max_length=7, truncate="both")
    assert data.rows(0)[0][0].tolist() == [CLS, 0, 1, 2, 8, 9, SEP]
    assert data.n_truncated == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "rows"}, "form is 'rows', expected one of single, pair-rows, cross"),
        ({"form": "triple"}, "form is 'triple', expected one of single, pair-rows, cross"),
        ({"truncate": "middle"}, "truncate is 'middle', expected one of head, tail, both"),
        ({"form": "cross"}, r"form 'cross' needs 2 text\(s\) per example, found 1"),
        ({"max_length": 2}, "max_length is 2, expected 3 to 4096"),
        ({"max_length": 4097}, "max_length is 4097, expected 3 to 4096"),
    ],
)
def test_impossible_settings(make_tokenised, settings: dict[str, object], message: str) -> None:
    arguments = {"form": "single", "max_length": 16} | settings
    with pytest.raises(ConfigError, match=f"task sst: {message}"):
        TaskData("sst", make_tokenised([[[1]]]), **arguments)

"""Which sentences of dev and test come back, against a plain comparison of all with all."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mtbert.data.held_out import FEWEST_WORDS, NEAR, HeldOut, letters
from mtbert.data.tables import Table


def held_out(*texts: str) -> HeldOut:
    rows = [(text,) for text in texts]
    return HeldOut(
        {"dev": Table("sst", "dev", Path("d"), [f"d{n}" for n in range(len(rows))], rows, None, [])}
    )


def test_letters_ignore_case_spaces_punctuation_and_forms() -> None:
    assert letters("It does n't , \uff32eally !") == letters("it doesn't really") == "itdoesntreally"
    assert letters("不错 。") == "不错"
    assert letters(" ?! ") == "?!"
    assert letters("?!") != letters("...")


def test_rows_and_sentences() -> None:
    pairs = [("A man eats .", "A dog barks ."), ("One more .", "Two more .")]
    dev = Table("sts", "dev", Path("d"), ["x", "y"], pairs, None, [])
    found = HeldOut({"train": dev, "dev": dev})
    leak = found.row(("a dog barks", "A man eats"))
    assert leak is not None
    assert str(leak) == "also stands in dev (id x)"
    assert found.row(("A man eats .", "Two more .")) is None
    assert found.sentence("two more") is not None
    assert HeldOut({"train": dev}).row(pairs[0]) is None, "training rows are not held out"


WORDS = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f", "g"]), min_size=1, max_size=12).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=12), WORDS)
def test_near_finds_what_comparing_with_all_finds(texts: list[str], text: str) -> None:
    def near(other: str) -> bool:
        a, b = (Counter(re.findall(r"\w+", t)) for t in (text, other))
        enough = min(a.total(), b.total()) >= FEWEST_WORDS
        return enough and (a & b).total() / (a | b).total() >= NEAR

    unique: dict[str, str] = {}
    for other in texts:
        unique.setdefault(letters(other), other)
    assert set(held_out(*texts).near(text)) == {n for n, other in enumerate(unique.values()) if near(other)}

"""Tables for the terminal and for Markdown, and foreign text in them."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbert.evaluation.markdown import escape, fenced
from mtbert.evaluation.table import markdown_table, table


def test_a_table_is_aligned() -> None:
    text = table(["task", "score", "n"], [["sst", 0.5, 1101], ["paraphrase", None, 7]])
    assert text == (
        "task        score      n\n"
        "----------  -----  -----\n"
        "sst         0.500  1,101\n"
        "paraphrase      -      7"
    )


def test_rows_must_fit_the_headers() -> None:
    with pytest.raises(ValueError, match="3 cells in a table of 2 columns"):
        table(["a", "b"], [["x", "y", "z"]])


def test_a_table_without_rows() -> None:
    assert table(["a", "bc"], []) == "a  bc\n-  --"


def test_a_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["x", 0.25]], digits=2) == "| a | b |\n| --- | ---: |\n| x | 0.25 |"


def unescape(text: str) -> str:
    """What CommonMark makes of escaped text: entities, and backslashes before punctuation."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", lambda found: f"&#{ord(found.group(1))};", text))


@given(st.text(max_size=60))
def test_escaped_text_shows_as_it_is_on_one_line(text: str) -> None:
    escaped = escape(text)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|*_`~<>\[\]$@]", escaped)
    visible = "".join(c for c in " ".join(text.split()) if c.isprintable())
    assert unescape(escaped) == visible


def test_a_review_in_a_table() -> None:
    review = "  So | bad<br /><br />*really*\n\n`rm -rf` [math]x_1[/math] & $y$ \\| \x00 " + "long " * 400
    cell = escape(review, 100)
    row = markdown_table(["text", "n"], [[cell, 1]]).split("\n")[2]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3  # the borders of two cells and no more
    assert "<br" not in row
    assert cell.endswith("long…")
    assert len(unescape(cell)) <= 100
    assert unescape(cell).startswith("So | bad<br /><br />*really* `rm -rf` [math]x_1[/math] & $y$ \\|")


def test_a_fence_holds_any_text() -> None:
    assert fenced("a\n```\nb\n", "yaml") == "````yaml\na\n```\nb\n````"

"""Free text and JSON as models write them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtbert.augmentation.answer import DECLINED, EMPTY, UNREADABLE, RejectedError, read_answer
from mtbert.tasks.registry import get_task

SST, STS = get_task("sst").layout, get_task("sts").layout

PAPER = (
    "Here is a paraphrased version of the review with the same sentiment score:\n\n"
    '"Their presence makes the movie worth watching on the big screen."\n\nSentiment score: 3 (somewhat positive)'
)


@pytest.mark.parametrize(
    ("text", "sentence", "label"),
    [
        (PAPER, "Their presence makes the movie worth watching on the big screen.", 3),
        ("A plain answer .", "A plain answer .", None),
        ('  "A quoted answer."  ', "A quoted answer.", None),
        ("“Curly quotes.”", "Curly quotes.", None),
        ('He said "no" twice, and "yes" once.', 'He said "no" twice, and "yes" once.', None),
        ('"No" is what he said, not "yes"', '"No" is what he said, not "yes"', None),
        ("It is slow.\t1", "It is slow.", 1),
        ("Paraphrase: It is slow.", "It is slow.", None),
        ("Sure! Here's the rewritten sentence: It is slow.\n\nNote: I kept the tone.", "It is slow.", None),
        ("**It is slow.**\n\nLabel: 1", "It is slow.", 1),
        ("<think>Label 1 it is.\nHm.</think>\n\nIt is slow.", "It is slow.", None),
        ("thinking aloud</think>It is slow.", "It is slow.", None),
        ("Two words remain: never again.", "Two words remain: never again.", None),
        ('{"sentence": "It is slow.", "sentiment": 1}', "It is slow.", 1),
        ('Sure:\n```json\n{"sentence": "It is slow.", "sentiment": "1 (negative)"}\n```', "It is slow.", 1),
        ("1. It is slow.", "It is slow.", None),
        ("I can't wait to see it again .", "I can't wait to see it again .", None),
        ("I'm sorry I saw this .", "I'm sorry I saw this .", None),
        ("Okay film, but with one flaw: its length .", "Okay film, but with one flaw: its length .", None),
        ("Text-heavy and slow: it drags .", "Text-heavy and slow: it drags .", None),
        ("New in town: a cop who cries .", "New in town: a cop who cries .", None),
        ("Rewritten review:\n- It is slow.\nThis paraphrase keeps the meaning.", "It is slow.", None),
    ],
)
def test_a_sentence(text: str, sentence: str, label: float | None) -> None:
    answer = read_answer(text, SST)
    assert (answer.texts, answer.label) == ((sentence,), label)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("sentence1: A man eats.\nsentence2: Someone has food.", None),
        (
            "Here you are:\n**Sentence 1:** A man eats.\n**Sentence 2:** Someone has food.\n\nSimilarity: 3.2",
            3.2,
        ),
        ("A man eats.\tSomeone has food.\t3.2", 3.2),
        ("1. A man eats.\n2. Someone has food.", None),
        ('"A man eats."\n"Someone has food."', None),
        ('{"sentence1": "A man eats.", "sentence2": "Someone has food.", "similarity": 3.2}', 3.2),
    ],
)
def test_a_pair(text: str, label: float | None) -> None:
    answer = read_answer(text, STS)
    assert (answer.texts, answer.label) == (("A man eats.", "Someone has food."), label)


PIECES = [
    "{", "}", '"', "'", ":", "\\n", "\n", "\t", "sentence", "sentence1", "sentence2", "label", "Score: 3",
    "0", "1e999", "[", "]", "<think>", "</think>", "```", "**", "Here is", "It is slow.", "-", "1.",
    "\ud800", " ", ",", "null", "NaN", "9" * 400,
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_whatever_is_written_is_a_row_or_is_rejected(text: str) -> None:
    for layout in (SST, STS):
        try:
            answer = read_answer(text, layout)
        except RejectedError:
            continue
        assert len(answer.texts) == len(layout.text_columns)
        assert all(part == part.strip() and part for part in answer.texts)


def test_hostile_answers_are_rejected_soon() -> None:
    deep = '{"sentence":' * 5000
    for text in (
        deep,
        "<think>" * 9000,
        '{"sentence": "a", "sentiment": ' + "9" * 400 + "}",
        "word\n" * 30000,
        "{" * 90000 + "\n\n",
        "<thinking>\nIt is slow.",
        "It" + " " * 90000 + "is slow.",
        "Score" + "\t" * 90000 + "slow",
        "Sure, the new text" + "*" * 90000,
    ):
        with pytest.raises(RejectedError):
            read_answer(text, SST)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", EMPTY),
        ("  \n", EMPTY),
        ('{"sentence": "", "sentiment": 1}', EMPTY),
        ('{"sentence": "It is sl', UNREADABLE),
        ('{"text": "It is slow."}', UNREADABLE),
        ('{"sentence": 7, "sentiment": 1}', UNREADABLE),
        ("It is slow.\nIt drags on.", UNREADABLE),
        ("I'm sorry, but I can't help with that.", DECLINED),
    ],
)
def test_what_cannot_be_used(text: str, reason: str) -> None:
    with pytest.raises(RejectedError, match=reason):
        read_answer(text, SST)

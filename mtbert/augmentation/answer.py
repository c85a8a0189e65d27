"""From what a language model writes to the texts of a row: JSON where it gives it, else text without its trimmings.

A free answer may carry a preamble, quotes, the label and notes, as in the example of Peng, Yuan and Wang 2024,
appendix A.4: `Here is a paraphrased version ...: "..." Sentiment score: 3 (somewhat positive)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mtbert.data.tables import TableLayout

UNREADABLE = "an answer that cannot be read"
DECLINED = "the model declined"
EMPTY = "an empty answer"


@dataclass(frozen=True)
class Answer:
    """The texts of a row as a model wrote them, and the label that it states for them, if it does."""

    texts: tuple[str, ...]
    label: float | None = None


class RejectedError(Exception):
    """Why an answer is not used: one of a few reasons, which are counted."""


MOST_CHARACTERS = 100_000
MOST_BLANK = 200
"""Blanks and stars in a row: no sentence has more, and the expressions below would take long over them."""
MOST_BRACES = 50
"""So many places are tried for the beginning of a JSON object."""
_THOUGHT_ENDS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"^```[a-z]*\s*|\s*```$", re.IGNORECASE)
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_LABEL = re.compile(
    rf"^[*_(\[\s]*(?:the\s+)?(?:new\s+|same\s+)?(?:(?:sentiment|similarity|paraphrase|duplicate)[\s_-]*)?"
    rf"(?:score|label|sentiment|rating|class|similarity|is_duplicate)\s*(?:score|label)?[*_\s]*(?:[:=]|\bis\b)[*_\s]*({_NUMBER})\b.*$",
    re.IGNORECASE,
)
_LABEL_BEHIND = re.compile(rf"(?:\t\s*|\s{{2,}})({_NUMBER})\s*$")
# What a model calls its sentence; a sentence that merely has a colon must stay whole.
_NAME = (
    r"(?:paraphrased?|rewritten|rephrased|repaired|corrected|revised|new|output|answer|response|result|sentence|review"
    r"|version|line|text)"
)
_OPENING = re.compile(
    rf"^[*_\s]*(?:(?:the\s+|my\s+)?{_NAME}(?:\s+{_NAME}){{0,2}}"
    r"|(?:sure|certainly|of course|okay|ok|absolutely|here(?:'s| is| are)|below is)\b"
    rf"[^:\n]{{0,120}}?\b{_NAME}\b[^:\n]{{0,80}})[*_\s]*:[*_\s]*",
    re.IGNORECASE,
)
_NOTE = re.compile(
    r"^[*_(\[\s]*(?:note\b|explanation\b|changes?\b[^.]*:|this (?:paraphrase|version|sentence|rewrite)\b"
    r"|i (?:have|'ve|kept|made|changed|tried|replaced)\b|let me know\b|both (?:versions|sentences)\b"
    r"|the (?:paraphrase|sentiment|meaning|label|original)\b.*\b(?:same|remains|kept|preserved|unchanged)\b"
    r"|hope this\b|original\b[^:\n]{0,30}:)",
    re.IGNORECASE,
)
_DECLINED = re.compile(
    r"^(?:(?:i(?:'m| am) sorry|sorry|i apologi[sz]e)[,.]?\s*(?:but\s+)?"
    r"(?:as an ai|i(?:\s+can|\s+won't|\s+will not|(?:'m|\s+am)\s+(?:not able|unable)))"
    r"|as an ai\b|i(?:'m| am) (?:unable|not able) to\b|i (?:can't|cannot|won't|will not) (?:help|assist|do that"
    r"|provide|comply|fulfill?|paraphrase|rewrite|rephrase|generate|create)\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "\u2018": "\u2019", "«": "»", "„": "“", "`": "`"}
_BLANK = re.compile(rf"[\s*_]{{{MOST_BLANK}}}")
_BULLET = re.compile(r"^\s*(?:[-*•]\s+|\d{1,2}[.)]\s+)")


def read_answer(text: str, layout: TableLayout) -> Answer:
    """The row in an answer. Raises RejectedError with the reason where there is none."""
    text = _THOUGHT_ENDS.split(text)[-1]  # the template of some servers swallows the tag that opens
    if len(text) > MOST_CHARACTERS or text.lstrip().lower().startswith("<think"):
        raise RejectedError(UNREADABLE)
    text = _FENCE.sub("", text.strip()).strip()
    if not text:
        raise RejectedError(EMPTY)
    found = _json_object(text)
    if found is not None:
        return _from_json(found, layout)
    if text.startswith("{"):
        raise RejectedError(UNREADABLE)
    if _DECLINED.match(text):
        raise RejectedError(DECLINED)
    return _from_text(text, layout)


def _json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in the text."""
    decoder = json.JSONDecoder()
    for match in islice(re.finditer(r"\{", text), MOST_BRACES):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except ValueError:
            continue
        except RecursionError:
            return None
        return value if isinstance(value, dict) else None
    return None


def _from_json(values: dict[str, Any], layout: TableLayout) -> Answer:
    texts = []
    for column in layout.text_columns:
        value = values.get(column)
        if not isinstance(value, str):
            raise RejectedError(UNREADABLE)
        texts.append(value.strip())
    label = values.get(layout.label_column, values.get("label"))
    if isinstance(label, str):
        match = re.match(rf"\s*({_NUMBER})\b", label)
        label = float(match[1]) if match else None
    if isinstance(label, bool):  # of a question such as is_duplicate
        label = int(label)
    if not all(texts):
        raise RejectedError(EMPTY)
    if _DECLINED.match(texts[0]):
        raise RejectedError(DECLINED)
    try:
        return Answer(tuple(texts), float(label) if isinstance(label, (int, float)) else None)
    except OverflowError:  # a whole number of hundreds of digits
        raise RejectedError(UNREADABLE) from None


def _from_text(text: str, layout: TableLayout) -> Answer:
    if _BLANK.search(text):
        raise RejectedError(UNREADABLE)
    lines = [line.strip(" \r") for line in text.split("\n") if line.strip()]
    label: float | None = None
    kept: list[str] = []
    for line in lines:
        stated = _LABEL.match(line.strip())
        if stated:
            label = float(stated[1]) if label is None else label
        elif kept and _NOTE.match(line):
            break
        else:
            kept.append(line)
    # A preamble is a line of its own, or stands before the sentence on its line.
    while len(kept) > 1 and kept[0].rstrip("*_ ").endswith(":"):
        kept.pop(0)
    if len(layout.text_columns) == 2:
        texts, stated_behind = _pair(kept, layout)
    else:
        texts, stated_behind = _single(kept)
    texts = tuple(_unquoted(part) for part in texts)
    if not texts or not all(texts):
        raise RejectedError(EMPTY)
    return Answer(texts, stated_behind if label is None else label)


def _single(lines: Sequence[str]) -> tuple[tuple[str, ...], float | None]:
    if len(lines) > 1:
        quoted = [line for line in lines if _unquoted(line) != line.strip()]
        if len(quoted) != 1:
            raise RejectedError(UNREADABLE)
        lines = quoted
    if not lines:
        return (), None
    line, label = _without_label(lines[0])
    line = _BULLET.sub("", line) if len(lines) == 1 and _BULLET.match(line) else line
    rest = _OPENING.sub("", line, count=1)
    if rest != line and rest.strip():
        # Only a preamble is taken off: a sentence may well have a colon itself, but then the colon is no opening.
        line = rest
    return (line,), label


def _pair(lines: Sequence[str], layout: TableLayout) -> tuple[tuple[str, ...], float | None]:
    label = None
    if len(lines) == 1 and "\t" in lines[0]:
        cells = [cell.strip() for cell in lines[0].split("\t") if cell.strip()]
        if len(cells) == 3 and re.fullmatch(_NUMBER, cells[2]):
            label = float(cells.pop())
        lines = cells
    parts = []
    for line in lines:
        line, behind = _without_label(line)
        label = behind if label is None else label
        parts.append(line)
    named = {}
    for number, column in enumerate(layout.text_columns, start=1):
        pattern = re.compile(
            rf"^[*_\s]*(?:{re.escape(column)}|(?:sentence|question|text|line)\s*{number}|{number}[.)])[*_]*\s*[:=.)]?[*_]*\s*",
            re.I,
        )
        for part in parts:
            if pattern.match(part) and column not in named:
                named[column] = pattern.sub("", part, count=1)
    if len(named) == 2:
        return tuple(named[column] for column in layout.text_columns), label
    if len(parts) == 2:
        return tuple(_BULLET.sub("", part) for part in parts), label
    raise RejectedError(UNREADABLE)


def _without_label(line: str) -> tuple[str, float | None]:
    """A line without the label behind a tab or a gap, as the lines of the prompt have it."""
    match = _LABEL_BEHIND.search(line)
    return (
        (line[: match.start()], float(match[1])) if match and line[: match.start()].strip() else (line, None)
    )


def _unquoted(text: str) -> str:
    text = text.strip()
    for mark in ("**", "__"):
        if len(text) > 4 and text.startswith(mark) and text.endswith(mark):
            text = text[2:-2].strip()
    while (
        len(text) > 1
        and _QUOTES.get(text[0]) == text[-1]
        and text[0] not in text[1:-1]
        and text[-1] not in text[1:-1]
    ):
        text = text[1:-1].strip()
    return text

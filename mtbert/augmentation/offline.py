"""Small changes that keep a label and need no server: a baseline for what a language model writes.

Word dropout and swapping follow the spirit of Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques for Boosting
Performance on Text Classification Tasks"; here negations are never dropped, because they carry the label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from mtbert.augmentation.answer import Answer, RejectedError
from mtbert.augmentation.config import Augmenter
from mtbert.augmentation.draws import Draws
from mtbert.augmentation.plan import Slot
from mtbert.augmentation.validation import COPY
from mtbert.data.tables import Table
from mtbert.errors import ConfigError
from mtbert.tasks.registry import Task

DROPOUT = 0.1
"""Share of the words that word dropout takes away."""
KEPT_WORDS = frozenset(
    [
        "no",
        "not",
        "n't",
        "never",
        "nothing",
        "none",
        "nobody",
        "nor",
        "neither",
        "without",
        "hardly",
        "cannot",
    ]
)
_MARKS = ".,;:!?"


def check_augmenters(names: Sequence[str], task: Task) -> None:
    """Raise ConfigError for an augmenter that there is not, or that the task cannot have."""
    for name in names:
        if name not in get_args(Augmenter):
            raise ConfigError(f"--offline: expected some of {', '.join(get_args(Augmenter))}, found {name!r}")
        if name == "swap" and not task.is_pair:
            raise ConfigError(f"--offline: swap needs pairs, and task {task.name} has single sentences")
    if len(set(names)) != len(names):
        raise ConfigError(f"--offline: {', '.join(names)} names one of them twice")
    if not names:
        raise ConfigError(f"--offline: expected some of {', '.join(get_args(Augmenter))}, found none")


class OfflineAugmenter:
    """Changes rows by `augmenters`, which take turns from row to row and from attempt to attempt."""

    def __init__(self, table: Table, augmenters: Sequence[str], seed: int) -> None:
        self._table, self._augmenters, self._seed = table, list(augmenters), seed

    async def answers(self, slots: Sequence[Slot], attempt: int) -> list[Answer | RejectedError]:
        """A changed row for each slot; a row that an augmenter cannot change is a copy."""
        return [self._answer(slot, attempt) for slot in slots]

    def method(self, slot: Slot, attempt: int) -> str:
        """The augmenter that makes this slot's row."""
        return self._augmenters[(slot.number + attempt) % len(self._augmenters)]

    def _answer(self, slot: Slot, attempt: int) -> Answer | RejectedError:
        name = self.method(slot, attempt)
        draws = Draws(self._seed, self._table.task, "offline", slot.number, attempt)
        texts = self._table.texts[slot.row(attempt)]
        if name == "swap":
            return Answer((texts[1], texts[0]))
        changed = tuple(_CHANGES[name](text, draws) for text in texts)
        return RejectedError(COPY) if changed == texts else Answer(changed)


def change_case(text: str, draws: Draws) -> str:
    """All small, all capital, a capital at the beginning of each word, or one word in capitals."""
    words = text.split(" ")
    shouted = draws.one([place for place, word in enumerate(words) if word] or [0])
    forms = [
        text.lower(),
        text.upper(),
        " ".join(word[:1].upper() + word[1:] for word in words),
        " ".join(word.upper() if place == shouted else word for place, word in enumerate(words)),
    ]
    return draws.one([form for form in forms if form != text] or [text])


def change_punctuation(text: str, draws: Draws) -> str:
    """Without or with a mark at the end, without commas, or with marks set close to, or apart from, their words."""
    bare = text.rstrip(" " + _MARKS)
    close, apart = text, text
    for mark in _MARKS:
        close = close.replace(f" {mark}", mark)
        apart = apart.replace(mark, f" {mark} ")
    forms = [
        bare,
        f"{bare} ." if " ." in text else f"{bare}.",
        " ".join(text.replace(",", " ").split()),
        close,
        " ".join(apart.split()),
    ]
    return draws.one([form for form in forms if form.strip() and form != text] or [text])


def drop_words(text: str, draws: Draws) -> str:
    """Without a tenth of its words, at least one; negations stay."""
    words = text.split()
    free = [place for place, word in enumerate(words) if not _is_kept(word)]
    if len(words) < 3 or not free:
        return text
    dropped = {place for place in free if draws.share() < DROPOUT} or {draws.one(free)}
    kept = [word for place, word in enumerate(words) if place not in dropped]
    return " ".join(kept) if any(any(c.isalnum() for c in word) for word in kept) else text


def _is_kept(word: str) -> bool:
    bare = word.lower().strip(_MARKS + "\"'`()")
    return bare in KEPT_WORDS or word.lower().endswith("n't")


_CHANGES: dict[str, Callable[[str, Draws], str]] = {
    "case": change_case,
    "punctuation": change_punctuation,
    "word-dropout": drop_words,
}

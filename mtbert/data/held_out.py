"""Which sentences of the dev and test tables a training example repeats, or nearly repeats."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mtbert.data.tables import Table

NEAR = 0.8
"""Two sentences are near when they share this part of their words (Jaccard's index of the two bags of words)."""
FEWEST_WORDS = 5
"""Shorter sentences are compared letter by letter only: two short ones share most of their words by chance."""
_WORD = re.compile(r"\w+")


def letters(text: str) -> str:
    """What a text is recognised by: its letters and digits, without case, spaces, punctuation and forms of characters.

    `does n't` and `Doesn't` are the same then. A text without any letter stands for itself.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(character for character in folded if character.isalnum()) or text.strip()


def row_letters(texts: Iterable[str]) -> tuple[str, ...]:
    """The same of an example; the order of a pair's sentences does not count."""
    return tuple(sorted(letters(text) for text in texts))


@dataclass(frozen=True)
class Leak:
    """Where a sentence also stands: the split, the id of the row there, and whether word by word."""

    split: str
    row_id: str
    exact: bool

    def __str__(self) -> str:
        """For messages."""
        return f"{'also stands' if self.exact else 'stands almost word by word'} in {self.split} (id {self.row_id})"


class HeldOut:
    """The sentences of tables that no training example may repeat."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        """tables: by split; the training table of them is left out."""
        self._rows: dict[tuple[str, ...], Leak] = {}
        self._sentences: dict[str, Leak] = {}
        self._texts: list[tuple[str, Leak]] = []
        for split, table in tables.items():
            if split == "train":
                continue
            for row_id, texts in zip(table.ids, table.texts, strict=True):
                leak = Leak(split, row_id, exact=True)
                self._rows.setdefault(row_letters(texts), leak)
                for text in texts:
                    key = letters(text)
                    if key not in self._sentences:
                        self._sentences[key] = leak
                        self._texts.append((text, Leak(split, row_id, exact=False)))

    def row(self, texts: Iterable[str]) -> Leak | None:
        """The example of dev or test that has the same sentences, a pair's in any order."""
        return self._rows.get(row_letters(texts))

    def sentence(self, text: str) -> Leak | None:
        """The first sentence of dev or test that has the same letters."""
        return self._sentences.get(letters(text))

    def near(self, text: str) -> dict[int, Leak]:
        """The sentences of dev and test that share almost all words with `text`, by number, those alike included."""
        bag = _bag(text)
        if bag.total() < FEWEST_WORDS:
            return {}
        bags, containing = self._bags, self._containing
        found: dict[int, Leak] = {}
        for word in self._rarest(bag):
            for number in containing.get(word, ()):
                other = bags[number]
                if number not in found and other.total() >= FEWEST_WORDS and _jaccard(bag, other) >= NEAR:
                    found[number] = self._texts[number][1]
        return found

    # Made when `near` is first asked: comparing letters needs none of it.

    @functools.cached_property
    def _bags(self) -> list[Counter[str]]:
        return [_bag(text) for text, _ in self._texts]

    @functools.cached_property
    def _frequency(self) -> Counter[str]:
        return Counter(word for bag in self._bags for word in bag)

    @functools.cached_property
    def _containing(self) -> dict[str, list[int]]:
        """The sentences that have a word among their rarest."""
        found: dict[str, list[int]] = {}
        for number, bag in enumerate(self._bags):
            for word in self._rarest(bag):
                found.setdefault(word, []).append(number)
        return found

    def _rarest(self, bag: Counter[str]) -> list[str]:
        """The words of which two near bags have one in common, whichever they are (prefix filtering).

        Of n words, near sentences share at least NEAR * n; so one of any n - NEAR * n + 1 of them is shared.
        """
        ordered = sorted(bag, key=lambda word: (self._frequency[word], word))
        allowed = bag.total() - int(NEAR * bag.total() + 0.999999)  # words that the other may lack
        taken, count = [], 0
        for word in ordered:
            taken.append(word)
            count += bag[word]
            if count > allowed:
                break
        return taken


def _bag(text: str) -> Counter[str]:
    return Counter(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _jaccard(a: Counter[str], b: Counter[str]) -> float:
    shared = (a & b).total()
    return shared / (a.total() + b.total() - shared)

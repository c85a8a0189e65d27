"""Which rows are good enough to train on; every other has a reason, and reasons are counted."""

from __future__ import annotations

import functools
import importlib
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mtbert.augmentation.answer import EMPTY, Answer, RejectedError
from mtbert.data.held_out import HeldOut, letters
from mtbert.data.tables import Table
from mtbert.errors import ConfigError
from mtbert.tasks.registry import Task

ANOTHER_LABEL = "another label"
CONTROL = "control characters or several lines"
SHORT, LONG = "too short", "too long"
COPY = "a copy of its original"
IN_TRAIN, MADE_BEFORE = "a duplicate of a training row", "a duplicate of another new row"
LANGUAGE = "another language"
LEAK, NEAR_LEAK = "a sentence of dev or test", "almost a sentence of dev or test"
ELSE = "says something else"
NOT_THIS_ONE = "changed the sentence that should stay"

MOST_WORDS = 2000
SLACK_WORDS = 5
"""So many words a short sentence may gain or lose beyond the bounds of its length."""
CONFIDENT = 0.95
LEAST_LETTERS = 25
"""Of shorter texts the language is a guess."""

Compare = Literal["letters", "text"]
Language = Callable[[str], dict[str, float]]


@dataclass(frozen=True)
class Bounds:
    """Words of a new text for each word of its original."""

    shortest: float = 0.4
    longest: float = 2.5

    def __post_init__(self) -> None:
        if not 0 <= self.shortest < 1 < self.longest:
            raise ConfigError(
                "--shortest, --longest: expected a number below 1 and one above 1 (words of a new sentence for each"
                f" word of its original), found {self.shortest:g} and {self.longest:g}"
            )


class Validator:
    """Judges new rows one after another; an accepted row counts for the duplicates of those behind it."""

    def __init__(
        self,
        task: Task,
        table: Table,
        held_out: HeldOut,
        *,
        bounds: Bounds,
        compare: Compare = "letters",
        language: Language | None = None,
        repairs: bool = False,
    ) -> None:
        """compare: what makes two rows the same: their letters (of paraphrases), or each character and the order.

        language: probabilities of languages by code for a text; None leaves that out. repairs: rows keep their words.
        """
        self._task, self._table, self._held_out = task, table, held_out
        self._bounds, self._compare, self._language, self._repairs = bounds, compare, language, repairs
        self._train = {self._key(texts) for texts in table.texts}
        self._made: set[tuple[str, ...]] = set()

    def accept(self, row: int, answer: Answer, *, kept: int | None = None) -> None:
        """Raise RejectedError with the reason why the answer cannot stand for training row `row`.

        kept: which of a pair's sentences had to stay as it was.
        """
        original = self._table.texts[row]
        texts = answer.texts
        if not all(text.strip() for text in texts):
            raise RejectedError(EMPTY)
        self._check_label(row, answer.label)
        if kept is not None and letters(texts[kept]) != letters(original[kept]):
            raise RejectedError(NOT_THIS_ONE)
        swapped = len(texts) == 2 and texts == original[::-1]
        for text, before in zip(texts, original[::-1] if swapped else original, strict=True):
            self._check_characters(text, before)
            self._check_length(text, before)
            if self._repairs:
                _check_words(text, before)
        key = self._key(texts)
        if not self._repairs:
            changed = [
                a for a, b in zip(texts, original, strict=True) if self._text_key(a) != self._text_key(b)
            ]
            if key == self._key(original) or (
                self._compare == "letters" and kept is None and len(changed) < len(texts)
            ):
                raise RejectedError(COPY)
            if key in self._train:
                raise RejectedError(IN_TRAIN)
            if key in self._made:
                raise RejectedError(MADE_BEFORE)
        self._check_leak(texts, original)
        if self._language is not None:
            self._check_language(" ".join(texts), " ".join(original))
        self._made.add(key)

    def _text_key(self, text: str) -> str:
        return letters(text) if self._compare == "letters" else text

    def _key(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        keys = [self._text_key(text) for text in texts]
        return tuple(sorted(keys) if self._compare == "letters" else keys)

    def _check_label(self, row: int, stated: float | None) -> None:
        assert self._table.labels is not None
        if stated is None:
            return
        given = float(self._table.labels[row])
        span = self._task.score_range
        tolerance = 0.0 if span is None else (span[1] - span[0]) / 10
        if not abs(stated - given) <= tolerance + 1e-9:
            raise RejectedError(ANOTHER_LABEL)

    def _check_characters(self, text: str, original: str) -> None:
        for character in text:
            odd = (
                unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
                or character == "\ufffd"
            )
            if odd and character not in original:
                raise RejectedError(CONTROL)
            if character in "\t\n\r":
                raise RejectedError(CONTROL)

    def _check_length(self, text: str, original: str) -> None:
        words, before = len(text.split()), len(original.split())
        if words < self._bounds.shortest * before and words < before - SLACK_WORDS:
            raise RejectedError(SHORT)
        if words > MOST_WORDS or (words > self._bounds.longest * before and words > before + SLACK_WORDS):
            raise RejectedError(LONG)
        # One endless word is no sentence either.
        if len(text) > 2 * self._bounds.longest * len(original) + 100:
            raise RejectedError(LONG)

    def _check_leak(self, texts: tuple[str, ...], original: tuple[str, ...]) -> None:
        if self._held_out.row(texts) is not None and self._held_out.row(original) is None:
            raise RejectedError(LEAK)
        own = {letters(text) for text in original}
        known: dict[int, object] | None = None
        for text in texts:
            if letters(text) in own:
                continue
            if self._held_out.sentence(text) is not None:
                raise RejectedError(LEAK)
            near = self._held_out.near(text)
            if near:
                # The original may be near that sentence, too: then its rewriting says nothing new about it.
                known = (
                    {n: leak for part in original for n, leak in self._held_out.near(part).items()}
                    if known is None
                    else known
                )
                if near.keys() - known.keys():
                    raise RejectedError(NEAR_LEAK)

    def _check_language(self, text: str, original: str) -> None:
        """Reject a text that is surely not in the language that its original surely is in."""
        if sum(character.isalpha() for character in text) < LEAST_LETTERS:
            return
        assert self._language is not None
        before = self._language(original)
        code = max(before, key=lambda name: before[name])
        # Related languages share what there is: Spanish may be .94 Spanish and .04 Galician, but it is no English.
        if before[code] >= CONFIDENT and self._language(text).get(code, 0.0) < 1 - CONFIDENT:
            raise RejectedError(LANGUAGE)


def _check_words(text: str, original: str) -> None:
    """A repair keeps the letters: at least two thirds of three-letter pieces stay."""
    a, b = _pieces(text), _pieces(original)
    if not b or not a:
        if a != b:
            raise RejectedError(ELSE)
        return
    shared = (a & b).total()
    if shared / max(a.total(), b.total()) < 2 / 3:
        raise RejectedError(ELSE)


def _pieces(text: str) -> Counter[str]:
    joined = letters(text)
    return Counter(joined[place : place + 3] for place in range(max(1, len(joined) - 2)))


@functools.cache
def load_language() -> Language:
    """py3langid's probabilities of languages. Raises ConfigError where it is not installed."""
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the language of the answers is checked by the library py3langid ({error}): pip install -e '.[augment]'"
        ) from None
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)

    @functools.lru_cache(maxsize=4096)
    def probabilities(text: str) -> dict[str, float]:
        return {str(code): float(share) for code, share in identifier.rank(text)}

    return probabilities

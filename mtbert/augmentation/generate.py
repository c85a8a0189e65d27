"""From a plan to new rows: asked for in rounds, judged in order, so that it does not matter who answers first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mtbert.augmentation.answer import Answer, RejectedError
from mtbert.augmentation.plan import Slot
from mtbert.augmentation.validation import Validator


class Author(Protocol):
    """Who writes the rows: a language model, or the offline augmenters."""

    async def answers(self, slots: Sequence[Slot], attempt: int) -> list[Answer | RejectedError]:
        """An answer, or why there is none, for each slot."""
        ...


@dataclass(frozen=True)
class NewRow:
    """An accepted row: for which slot, from which training row, at which attempt."""

    slot: Slot
    row: int
    attempt: int
    texts: tuple[str, ...]


@dataclass
class Outcome:
    """The accepted rows in the order of their slots, and why other answers were not used.

    `rejected` counts every answer that was not used, `missing` the last reason of each slot that stayed empty.
    """

    rows: list[NewRow] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    missing: dict[int, str] = field(default_factory=dict)
    """By the slot's number."""


async def make_rows(
    slots: Sequence[Slot],
    author: Author,
    validator: Validator,
    *,
    attempts: int,
    kept_sentence: Callable[[int, int], int | None] = lambda row, draw: None,
) -> Outcome:
    """Fill the slots: at most `attempts` rounds, each for the slots that are still empty.

    kept_sentence: which of a pair's sentences had to stay, from the training row and the slot's number.
    """
    outcome = Outcome()
    found: dict[int, NewRow] = {}
    waiting = list(slots)
    for attempt in range(attempts):
        if not waiting:
            break
        answers = await author.answers(waiting, attempt)
        empty = []
        for slot, answer in zip(waiting, answers, strict=True):
            row = slot.row(attempt)
            try:
                if isinstance(answer, RejectedError):
                    raise answer
                validator.accept(row, answer, kept=kept_sentence(row, slot.number))
            except RejectedError as reason:
                outcome.rejected[str(reason)] += 1
                outcome.missing[slot.number] = str(reason)
                empty.append(slot)
            else:
                found[slot.number] = NewRow(slot, row, attempt, answer.texts)
                outcome.missing.pop(slot.number, None)
        waiting = empty
    outcome.rows = [found[slot.number] for slot in slots if slot.number in found]
    return outcome

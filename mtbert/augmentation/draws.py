"""Seeded draws that stay the same in every version of Python and numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from mtbert.data.batching import counter_generator

T = TypeVar("T")


class Draws:
    """A stream of random numbers that is a function of `parts` alone."""

    def __init__(self, *parts: object) -> None:
        self._generator = counter_generator("augmentation", *parts)

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self._generator.random_raw()) % count

    def share(self) -> float:
        """A number from 0 to 1, 1 excluded."""
        return int(self._generator.random_raw()) / 2.0**64

    def one(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in random order."""
        keys = np.atleast_1d(self._generator.random_raw(len(values)))
        return [values[place] for place in np.argsort(keys, kind="stable").tolist()]

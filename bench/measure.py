"""Several sides measured alternately in one process, so that the machine's load meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise ValueError("there is nothing to summarise")
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        return cls(median, low, high, len(values))


@dataclass
class Side:
    """One of the things compared."""

    name: str
    run: Callable[[int], float]
    """Does repeat number n (from 0) and returns the work done: useful tokens, or FLOPs. Every side gets the
    same numbers, so that it can take the sentences that belong to them."""
    figures: dict[str, float] = field(default_factory=dict)
    """More that is known about the side, for the record."""
    activations: Callable[[], tuple[int, int]] | None = None
    """Useful tokens of passes through the encoder, and the bytes that their activations took (see bench/memory.py)."""
    profile: Callable[[], dict[str, Any]] | None = None
    """Where the time of a step goes (what mtbert's own profile holds), for a goal that is missed."""
    close: Callable[[], None] = lambda: None
    """Ends what the side keeps running."""


class Alternation:
    """Runs sides in turn and keeps the rate (work a second) of every run.

    A round runs every side once. The side that begins moves on from round to round: none always follows
    the same other one, whose caches and heat it would inherit. Rates of the same round are neighbours in time:
    their ratio cancels what a busy machine does to both, so compare sides by `ratio`, not by their medians.
    """

    def __init__(
        self,
        sides: Sequence[Side],
        *,
        synchronise: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`synchronise` waits for the device; `clock` gives seconds."""
        names = [side.name for side in sides]
        if len(set(names)) != len(names):
            raise ValueError(f"two sides have one name: {names}")
        self.sides = list(sides)
        self.rates: dict[str, list[float]] = {name: [] for name in names}
        self.work: dict[str, float] = dict.fromkeys(names, 0.0)
        self.rounds = 0
        self._synchronise = synchronise
        self._clock = clock

    def warm_up(self, repeat: int = 0) -> None:
        """One unmeasured run of every side."""
        for side in self.sides:
            side.run(repeat)
        self._synchronise()

    def round(self) -> None:
        """One measured run of every side."""
        first = self.rounds % len(self.sides)
        for side in self.sides[first:] + self.sides[:first]:
            self._synchronise()
            begin = self._clock()
            work = side.run(self.rounds)
            self._synchronise()
            self.rates[side.name].append(work / (self._clock() - begin))
            self.work[side.name] += work
        self.rounds += 1

    def rate(self, name: str) -> Spread:
        """Work a second of one side."""
        return Spread.of(self.rates[name])

    def ratio(self, side: str, to: str, factor: float = 1.0) -> Spread:
        """Rate of `side` over that of `to`, times `factor`, round by round."""
        pairs = zip(self.rates[side], self.rates[to], strict=True)
        return Spread.of([factor * a / b for a, b in pairs])

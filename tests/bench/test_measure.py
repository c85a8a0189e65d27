"""Alternation, medians, ratios, goals."""

from __future__ import annotations

import pytest

from bench.comparison import Goal, summarise, to_text
from bench.measure import Alternation, Side, Spread


class Clock:
    """A clock that only sides move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def alternation_of(seconds: dict[str, list[float]]) -> tuple[Alternation, list[str]]:
    """Sides that take the given seconds in their repeats for 100 tokens each, and the order of all runs."""
    clock, order = Clock(), list[str]()

    def side(name: str) -> Side:
        def run(repeat: int) -> float:
            order.append(f"{name}{repeat}")
            clock.now += seconds[name][repeat]
            return 100.0

        return Side(name, run)

    return Alternation([side(name) for name in seconds], clock=clock), order


def test_every_round_runs_every_side_once_and_the_first_side_moves_on() -> None:
    alternation, order = alternation_of({"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3})
    for _ in range(3):
        alternation.round()
    assert order == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert alternation.work == {"a": 300.0, "b": 300.0, "c": 300.0}


def test_warm_up_is_not_measured() -> None:
    alternation, order = alternation_of({"a": [1.0, 9.0], "b": [2.0, 9.0]})
    alternation.warm_up(1)
    alternation.round()
    assert order == ["a1", "b1", "a0", "b0"]
    assert alternation.rates == {"a": [100.0], "b": [50.0]}


def test_a_ratio_pairs_the_runs_of_a_round() -> None:
    # The machine slows down fourfold on the way; b takes twice as long as a throughout.
    alternation, _ = alternation_of({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]})
    for _ in range(3):
        alternation.round()
    assert alternation.rate("a") == Spread(50.0, 37.5, 75.0, 3)
    assert alternation.ratio("a", "b") == Spread(2.0, 2.0, 2.0, 3)
    assert alternation.ratio("a", "b", factor=3.0).median == 6.0


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


def test_sides_need_names_of_their_own() -> None:
    with pytest.raises(ValueError, match="one name"):
        Alternation([Side("a", lambda _: 1.0), Side("a", lambda _: 1.0)])


def test_summary_of_shares_and_goals() -> None:
    alternation, _ = alternation_of({"mine": [1.0, 1.0], "theirs": [2.0, 4.0], "limit": [0.1, 0.1]})
    for _ in range(2):
        alternation.round()
    goals = [
        Goal("mine", "theirs", 3.0),
        Goal("mine", "theirs", 3.1),
        Goal("mine", "theirs"),
        Goal("mine", "absent", 1.0),
    ]
    result = summarise(
        "case",
        alternation,
        baseline="theirs",
        limits=["limit"],
        limit_of={"mine": ("limit", 2.0)},
        goals=goals,
        left_out=["absent"],
    )
    mine, theirs = result.cases
    assert mine.ratio.median == 3.0
    assert mine.limit_share is not None
    assert mine.limit_share.median == pytest.approx(0.2)  # 100 tokens of 2 FLOPs in 1 s, 1000 FLOP/s possible
    assert theirs.limit_share is None
    assert [outcome.met for outcome in result.goals] == [True, False, None]
    text = to_text(result)
    assert "goal reached: mine / theirs = 3.00" in text
    assert "goal MISSED" in text
    assert "ratio: mine / theirs = 3.00" in text
    assert "left out: absent" in text

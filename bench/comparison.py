"""One comparison: sides that ran alternately, what they reached, and the goals set for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.measure import Alternation, Spread


@dataclass(frozen=True)
class Goal:
    """A ratio of two sides, and what it should reach; missing it is recorded, not an error."""

    side: str
    to: str
    at_least: float | None = None
    """None: the ratio is of interest, no goal is set."""


@dataclass
class Case:
    """What one side reached."""

    name: str
    tokens_per_second: Spread
    ratio: Spread
    """To the comparison's baseline, round by round."""
    limit_share: Spread | None = None
    """Part of the measured matrix-product rate of its precision that the encoder's products account for."""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a goal came out; `met` says whether the median reached it (None where none is set)."""

    goal: Goal
    ratio: Spread
    met: bool | None


@dataclass
class Comparison:
    """The result, as the table shows it and the record keeps it."""

    name: str
    baseline: str
    cases: list[Case]
    goals: list[Outcome]
    limits: dict[str, Spread]
    """Measured matrix-product rates, FLOP/s."""
    left_out: list[str]
    """Sides whose packages are not installed."""
    implementations: dict[str, str] = field(default_factory=dict)
    """What served sides that several implementations could have served."""

    def to_record(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def summarise(
    name: str,
    alternation: Alternation,
    *,
    baseline: str,
    limits: Sequence[str] = (),
    limit_of: Mapping[str, tuple[str, float]] | None = None,
    goals: Sequence[Goal] = (),
    left_out: Sequence[str] = (),
    implementations: Mapping[str, str] | None = None,
) -> Comparison:
    """Medians, ratios and goals of finished rounds.

    limits: the sides that measure matrix products. limit_of: for other sides, which of those bounds them and
    the FLOPs that a useful token takes. Goals that name a side which was left out are left out too.
    """
    cases = []
    for side in alternation.sides:
        if side.name in limits:
            continue
        limit, flops = (limit_of or {}).get(side.name, (None, 0.0))
        cases.append(
            Case(
                side.name,
                alternation.rate(side.name),
                alternation.ratio(side.name, baseline),
                None if limit is None else alternation.ratio(side.name, limit, flops),
                side.figures,
            )
        )
    outcomes = []
    for goal in goals:
        if goal.side in alternation.rates and goal.to in alternation.rates:
            ratio = alternation.ratio(goal.side, goal.to)
            outcomes.append(
                Outcome(goal, ratio, None if goal.at_least is None else ratio.median >= goal.at_least)
            )
    rates = {limit: alternation.rate(limit) for limit in limits}
    return Comparison(name, baseline, cases, outcomes, rates, list(left_out), dict(implementations or {}))


def to_text(comparison: Comparison) -> str:
    """A table for the terminal: median [quartiles]."""
    titles = ("", "useful tokens/s", f"x {comparison.baseline}", "of the matrix limit", "")
    lines = [titles]
    for case in comparison.cases:
        share = "" if case.limit_share is None else f"{100 * case.limit_share.median:.0f}%"
        more = ", ".join(f"{name} {value:,.3g}" for name, value in case.figures.items())
        lines.append(
            (case.name, _spread(case.tokens_per_second, ",.0f"), _spread(case.ratio, ".2f"), share, more)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    text = [comparison.name]
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:4], widths[1:4], strict=True))]
        text.append("  ".join([*cells, line[4]]).rstrip())
    for outcome in comparison.goals:
        goal, ratio = outcome.goal, _spread(outcome.ratio, ".2f")
        said = f"{goal.side} / {goal.to} = {ratio}"
        if outcome.met is None:
            text.append(f"ratio: {said}")
        else:
            verdict = "reached" if outcome.met else "MISSED"
            text.append(f"goal {verdict}: {said}, wanted at least {goal.at_least}")
    for name, rate in comparison.limits.items():
        text.append(f"{name}: {_spread(Spread(*_scaled(rate)), '.2f')} TFLOP/s")
    for name, implementation in comparison.implementations.items():
        text.append(f"{name} is served by {implementation}")
    if comparison.left_out:
        text.append(f"left out: {', '.join(comparison.left_out)}")
    return "\n".join(text)


def _scaled(rate: Spread) -> tuple[float, float, float, int]:
    return rate.median / 1e12, rate.low / 1e12, rate.high / 1e12, rate.repeats


def _spread(spread: Spread, form: str) -> str:
    if spread.repeats == 1:
        return f"{spread.median:{form}}"
    return f"{spread.median:{form}} [{spread.low:{form}}-{spread.high:{form}}]"

"""One comparison: sides that ran alternately, what they reached, and the goals set for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from bench.measure import Alternation, Spread

Measure = Literal["speed", "limit share", "activation memory"]
MEMORY = "activation_kibibytes_per_token"
"""The figure of a side that goals of activation memory are about."""


@dataclass(frozen=True)
class Goal:
    """What a side should reach, by itself or beside another; missing it is recorded, not an error."""

    side: str
    to: str | None
    """The ratio to this side counts; None: the figure itself (useful tokens a second, a share, KiB a token)."""
    at_least: float | None = None
    """None, without `at_most`: the figure is of interest, no goal is set."""
    at_most: float | None = None
    of: Measure = "speed"

    @property
    def subject(self) -> str:
        """What is measured, in words."""
        subject = self.side if self.to is None else f"{self.side} / {self.to}"
        return subject if self.of == "speed" else f"{subject}, {self.of}"

    def is_met(self, value: float) -> bool | None:
        """Whether `value` reaches it; None where no goal is set."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


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
    """The figure itself, where the goal names no other side."""
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
    """Sides whose packages are not installed, or that this session does not run, with the reason."""
    implementations: dict[str, str] = field(default_factory=dict)
    """What served sides that several implementations could have served."""
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Where a step's time goes, of the sides that missed a goal of speed."""
    unit: str = "useful tokens"
    """What the sides' rates count."""

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
    the FLOPs that a useful token takes. Goals about what was not measured (a side that was left out, the memory of a
    side that does not know it) are left out too.
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
    found = {case.name: case for case in cases}
    outcomes = []
    for goal in dict.fromkeys(goals):
        if goal.to is None and goal.at_least is None and goal.at_most is None:
            continue  # the case itself says that
        reached = _reached(goal, alternation, found)
        if reached is not None:
            outcomes.append(Outcome(goal, reached, goal.is_met(reached.median)))
    rates = {limit: alternation.rate(limit) for limit in limits}
    return Comparison(name, baseline, cases, outcomes, rates, list(left_out), dict(implementations or {}))


def _reached(goal: Goal, alternation: Alternation, cases: Mapping[str, Case]) -> Spread | None:
    """The figure that a goal is about; None where it was not measured."""
    sides = [goal.side] if goal.to is None else [goal.side, goal.to]
    if any(side not in alternation.rates for side in sides):
        return None
    if goal.of == "speed":
        return alternation.rate(goal.side) if goal.to is None else alternation.ratio(goal.side, goal.to)
    if goal.of == "limit share":
        shares = [cases[side].limit_share for side in sides if side in cases]
        medians = [share.median for share in shares if share is not None]
        if len(medians) < len(sides):
            return None
        return shares[0] if goal.to is None else Spread.of([medians[0] / medians[1]])
    held = [cases[side].figures.get(MEMORY) for side in sides if side in cases]
    known = [value for value in held if value is not None]
    if len(known) < len(sides):
        return None
    return Spread.of([known[0] if goal.to is None else known[0] / known[1]])


def to_text(comparison: Comparison) -> str:
    """A table for the terminal: median [quartiles]."""
    titles = ("", f"{comparison.unit}/s", f"x {comparison.baseline}", "of the matrix limit", "")
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
        goal = outcome.goal
        form = ",.0f" if goal.to is None and goal.of == "speed" else ".2f"
        said = f"{goal.subject} = {_spread(outcome.ratio, form)}"
        if outcome.met is None:
            text.append(f"ratio: {said}")
            continue
        bounds = (("at least", goal.at_least), ("at most", goal.at_most))
        wanted = " and ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)
        text.append(f"goal {'reached' if outcome.met else 'MISSED'}: {said}, wanted {wanted}")
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

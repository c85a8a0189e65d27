"""Where the time of a step is: by phase, and by operation."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtbert.evaluation.plots.style import BLUE, GREY, ORANGE, PURPLE, SKY, Source, legend, panels, tidy
from mtbert.evaluation.profile import OperationTime, ProfileFacts

_COLOURS = {"forward": BLUE, "recompute": PURPLE, "backward": ORANGE}
_BAR = 0.36
"""Inches a bar."""


def profile_plot(profile: ProfileFacts, source: Source) -> Figure:
    """Bars of milliseconds a step; behind an operation's bar, how near it is to the limits."""
    longest = max(len(profile.phases) + 1, len(profile.operations))
    figure, (phases, operations) = panels(2, source, width=5.4, height=1.3 + _BAR * longest)
    _phases(phases, profile)
    _operations(operations, profile)
    return figure


def _phases(axes: Axes, profile: ProfileFacts) -> None:
    names = [*profile.phases, "unexplained"]
    outside = [1e3 * part for _, part in profile.phases.values()] + [0.0]
    inside = [1e3 * whole - part for (whole, _), part in zip(profile.phases.values(), outside, strict=False)]
    axes.barh(names, [*inside, 0.0], color=BLUE, label="in operations")
    axes.barh(names, outside, left=[*inside, 0.0], color=SKY, label="outside of operations")
    axes.barh(["unexplained"], [1e3 * profile.unexplained], color=GREY)
    totals = [*(1e3 * whole for whole, _ in profile.phases.values()), 1e3 * profile.unexplained]
    shares = [total / (1e3 * profile.step) if profile.step else 0.0 for total in totals]
    _write_behind(axes, totals, [f"{share:.1%}" for share in shares])
    _finish(axes, f"A step of {1e3 * profile.step:,.1f} ms by phase")


def _operations(axes: Axes, profile: ProfileFacts) -> None:
    found = profile.operations
    names = [each.name for each in found]
    left = [0.0] * len(found)
    for direction, colour in _COLOURS.items():
        times = [1e3 * each.seconds.get(direction, 0.0) for each in found]
        if any(times):
            axes.barh(names, times, left=left, color=colour, label=direction)
        left = [a + b for a, b in zip(left, times, strict=True)]
    _write_behind(axes, left, [_limits(each) for each in found])
    _finish(axes, "by operation")


def _limits(each: OperationTime) -> str:
    parts = [f"{each.share:.1%}"]
    if each.of_products is not None:
        parts.append(f"{each.of_products:.0%} of products")
    elif each.of_copy is not None:
        parts.append(f"{each.of_copy:.0%} of copy")
    return ", ".join(parts)


def _write_behind(axes: Axes, ends: list[float], texts: list[str]) -> None:
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.annotate(
            text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", size=8, color=GREY
        )


def _finish(axes: Axes, title: str) -> None:
    tidy(axes, title, "ms a step", "")
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.42)  # room for what stands behind the bars
    axes.set_xlim(left=0.0)
    legend(axes, loc="lower right")

"""The plots of the page of records: sides beside each other, and rates against sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from mtbert.evaluation.plots.style import (
    BLUE,
    GREY,
    MARKERS,
    SEQUENCE,
    Source,
    legend,
    new_figure,
    panels,
    save,
    tidy,
)

SPEED = ("full fine-tuning", "lora", "two rows a pair", "gradient surgery, full", "gradient surgery, lora")
"""Comparisons whose sides stand beside each other."""
ALL_PAIRS = "all pairs of sentences"
AXES = {
    "scaling: tokens of a step": "useful tokens a step",
    "scaling: tokens of a row": "tokens of every row",
    "scaling: weights of the encoder": "million weights in the encoder's products",
    "scaling: ranks": "ranks",
}
_TIMES = 5.0
"""A side so many times as fast as the baseline (cached features) would leave nothing to see of the others."""


def speed_plot(device: str, comparisons: Mapping[str, dict[str, Any]], path: Path) -> Path:
    """A panel a comparison: a bar a side, with quartiles and the ratio to the baseline; mtbert's are blue."""
    names = [name for name in SPEED if name in comparisons]
    shown = {
        name: [c for c in comparisons[name]["cases"] if c["ratio"]["median"] <= _TIMES] for name in names
    }
    heights = [0.9 + 0.3 * len(shown[name]) for name in names]
    figure = new_figure(9.0, sum(heights), Source(device, _commits(comparisons)))
    grid = figure.add_gridspec(len(names), 1, height_ratios=heights)
    for place, name in enumerate(names):
        _bars(figure.add_subplot(grid[place, 0]), name, shown[name], comparisons[name]["baseline"])
    return save(figure, path)


def pairs_plot(device: str, comparisons: Mapping[str, dict[str, Any]], path: Path) -> Path:
    """Seconds for all pairs of N sentences: by vectors as measured, by reading the pairs at the measured rate."""
    found = next(iter(comparisons.values()))
    figure = new_figure(6.4, 4.0, Source(device, _commits(comparisons)))
    panel = figure.add_subplot()
    tidy(panel, "Similarity of all pairs of N sentences", "sentences", "seconds")
    by_vectors, largest = [], 0.0
    for case in found["cases"]:
        count, rate = case["figures"]["sentences"], case["tokens_per_second"]["median"]
        if case["name"] != found["baseline"]:
            by_vectors.append((count, case["figures"]["pairs"] / rate))
        largest = max(largest, count)
    reading = next(case for case in found["cases"] if case["name"] == found["baseline"])
    rate, measured = reading["tokens_per_second"]["median"], reading["figures"]["sentences"]
    counts = sorted({measured, *(count for count, _ in by_vectors)})
    seconds = [n * (n - 1) / 2 / rate for n in counts]
    panel.plot(
        counts, seconds, color=GREY, marker="o", markerfacecolor="white", label="cross-encoder, at its rate"
    )
    panel.plot(measured, seconds[counts.index(measured)], "o", color=GREY, label="cross-encoder, measured")
    panel.plot(*zip(*sorted(by_vectors), strict=True), color=BLUE, marker="o", label="vectors, measured")
    for line, places in ((GREY, list(zip(counts, seconds, strict=True))), (BLUE, sorted(by_vectors))):
        for x, y in places:
            panel.annotate(
                _duration(y), (x, y), xytext=(6, -10), textcoords="offset points", size=8, color=line
            )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(right=largest * 2.5)
    legend(panel, loc="upper left")
    return save(figure, path)


def _duration(seconds: float) -> str:
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _bars(panel: Axes, name: str, cases: list[dict[str, Any]], baseline: str) -> None:
    tidy(panel, name, "useful tokens a second", "")
    for row, case in enumerate(reversed(cases)):
        rate, ratio = case["tokens_per_second"], case["ratio"]["median"]
        own = case["name"].startswith(("mtbert", "summed", "pcgrad"))
        spread = [[max(0.0, rate["median"] - rate["low"])], [max(0.0, rate["high"] - rate["median"])]]
        panel.barh(row, rate["median"], xerr=spread, color=BLUE if own else GREY, height=0.65, capsize=2)
        label = "1" if case["name"] == baseline else f"{ratio:.2f}"
        end = max(rate["high"], rate["median"])
        panel.annotate(label, (end, row), xytext=(5, 0), textcoords="offset points", va="center", size=8)
    panel.set_yticks(range(len(cases)), [case["name"] for case in reversed(cases)])
    panel.grid(False, axis="y")
    panel.margins(x=0.08)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def scaling_plot(device: str, comparisons: Mapping[str, dict[str, Any]], path: Path) -> Path:
    """A panel a comparison: the rate of each side against what grows, both on logarithmic axes."""
    figure, axes = panels(len(comparisons), Source(device, _commits(comparisons)))
    for panel, (name, found) in zip(axes, comparisons.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for case in found["cases"]:
            side = case["name"].split(" @ ")[0]
            lines.setdefault(side, []).append((case["figures"]["at"], case["tokens_per_second"]["median"]))
        places = sorted({at for points in lines.values() for at, _ in points})
        for number, (side, points) in enumerate(lines.items()):
            at, rates = zip(*sorted(points), strict=True)
            panel.plot(at, rates, color=SEQUENCE[number], marker=MARKERS[number], markersize=4, label=side)
        tidy(panel, name, AXES.get(name, ""), "useful tokens a second")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(places, [f"{at:,.3g}" if at < 1000 else f"{at:,.0f}" for at in places], rotation=30)
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        legend(panel)
    return save(figure, path)


def _commits(comparisons: Mapping[str, dict[str, Any]]) -> str:
    """All that the plot's records were measured at."""
    return ", ".join(dict.fromkeys(found["measured"]["git"] for found in comparisons.values()))

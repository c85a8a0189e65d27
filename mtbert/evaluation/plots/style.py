"""What every figure has in common: colours, sizes, and a footer with run name and commit."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mtbert.evaluation.files import write_bytes

# Okabe and Ito (2008): told apart with every common kind of colour blindness.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#6B6B6B"
SEQUENCE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TRAIN, DEV = BLUE, VERMILION

DPI = 100
_FOOTER_INCHES = 0.24
_LONGEST_FOOTER = 110


@dataclass(frozen=True)
class Source:
    """Where a figure's numbers come from: the run (or runs) and the commit."""

    name: str
    git: str


def panels(
    count: int, source: Source, *, width: float = 4.6, height: float = 3.5
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` x `height` inches, at most three in a row, and the footer."""
    across = min(count, 2 if count == 4 else 3)
    down = math.ceil(count / across)
    figure = new_figure(max(across * width, 5.5), down * height, source)
    return figure, [figure.add_subplot(down, across, place + 1) for place in range(count)]


def stacked_panels(
    count: int, source: Source, *, width: float = 4.6, heights: tuple[float, float] = (3.2, 3.9)
) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure with `count` pairs of panels, the second under the first, pairs laid out as `panels` are."""
    across = min(count, 2 if count == 4 else 3)
    down = math.ceil(count / across)
    figure = new_figure(max(across * width, 5.5), down * sum(heights), source)
    grid = figure.add_gridspec(2 * down, across, height_ratios=heights * down)
    pairs = []
    for place in range(count):
        row, column = divmod(place, across)
        pairs.append(
            (figure.add_subplot(grid[2 * row, column]), figure.add_subplot(grid[2 * row + 1, column]))
        )
    return figure, pairs


def new_figure(width: float, height: float, source: Source) -> Figure:
    """An empty figure of `width` x `height` inches plus a footer strip."""
    total = height + _FOOTER_INCHES
    strip = _FOOTER_INCHES / total
    layout = ConstrainedLayoutEngine(rect=(0.0, strip, 1.0, 1.0 - strip), w_pad=0.08, h_pad=0.08, wspace=0.05)
    figure = Figure(figsize=(width, total), dpi=DPI, layout=layout, facecolor="white")
    name = source.name
    room = min(_LONGEST_FOOTER, int(width * 15)) - len(source.git)
    if len(name) > room:
        name = name[: max(room - 1, 1)] + "…"
    text = f"{name}  ·  {source.git}"
    figure.text(
        1.0 - 0.06 / width, 0.06 / total, text, ha="right", va="bottom", size=7, color=GREY, parse_math=False
    )
    return figure


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, axis labels (with units), a light grid behind the data and no frame at the top and the right."""
    axes.set_title(title, size=11, loc="left", parse_math=False)
    axes.set_xlabel(x, size=9)
    axes.set_ylabel(y, size=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(axes: Axes, **options: Any) -> None:
    """A small legend where the data leave room; none for an empty panel."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, labels, fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", **options)


def empty(axes: Axes, text: str) -> None:
    """Say in an empty panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", size=9, color=GREY, transform=axes.transAxes)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its neighbours within `window` places (fewer at the ends)."""
    half = window // 2
    return [
        sum(part) / len(part)
        for part in (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    ]


def save(figure: Figure, path: Path) -> Path:
    """Write the figure as PNG at 100 dots an inch; a UserError names the path when it can't be written."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DPI)
    return write_bytes(path, image.getvalue())

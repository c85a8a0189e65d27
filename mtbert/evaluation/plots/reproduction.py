"""Published scores and ours, one line a row."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtbert.evaluation.plots.style import BLACK, BLUE, GREY, VERMILION, Source, new_figure, tidy
from mtbert.evaluation.published import Published
from mtbert.evaluation.reproduction import RowResult, judge


def reproduction_plot(done: Sequence[RowResult], published: Published, source: Source) -> Figure:
    """Every row with a published figure and ours: circle and dot under the row's formula, our interval, grey where the
    difference says nothing of the row."""
    shown = [(result, verdict) for result in done if (verdict := judge(result, published)) is not None]
    figure = new_figure(8.0, 1.2 + 0.24 * len(shown), source)
    panel = figure.add_subplot()
    tidy(panel, "Published and ours, on dev", "score under the row's formula (95% interval of ours)", "")
    labels = []
    for place, (result, verdict) in enumerate(shown):
        score, theirs = result.score, result.row.compared
        assert score is not None
        assert theirs is not None
        color = BLUE if verdict.conclusive else GREY
        panel.plot([theirs, score.mean], [place, place], color="#CCCCCC", linewidth=1.0, zorder=1)
        panel.plot([score.low, score.high], [place, place], color=color, linewidth=2.4, zorder=2)
        panel.plot([score.mean], [place], color=color, marker="o", markersize=5, zorder=3)
        panel.plot(
            [theirs], [place], marker="o", markersize=6, zorder=4, markerfacecolor="white", color=VERMILION
        )
        labels.append(f"{result.row.name} ({result.row.formula})")
        if place and result.row.paper != shown[place - 1][0].row.paper:
            panel.axhline(place - 0.5, color=BLACK, linewidth=0.6)
    panel.set_yticks(range(len(shown)), labels, size=8)
    panel.set_ylim(len(shown) - 0.4, -0.6)
    panel.grid(False, axis="y")
    handles = [
        Line2D(
            [], [], color=VERMILION, marker="o", markerfacecolor="white", linestyle="none", label="published"
        ),
        Line2D([], [], color=BLUE, marker="o", linewidth=2.4, label="ours"),
    ]
    if not all(verdict.conclusive for _, verdict in shown):
        label = "ours, shortened or not comparable"
        handles.append(Line2D([], [], color=GREY, marker="o", linewidth=2.4, label=label))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure

"""Figures of a sweep: scores over trials, learning curves, parameters in parallel, slices and importances."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from mtbert.evaluation.plots.style import (
    BLACK,
    BLUE,
    GREY,
    SKY,
    VERMILION,
    Source,
    empty,
    legend,
    new_figure,
    panels,
    tidy,
)

if TYPE_CHECKING:
    from mtbert.evaluation.sweep_report import SweepTrial

_COLOURS = colormaps["viridis"]
_LABEL = 22
_ABSENT = -0.13
"""Where lines pass the axis of a parameter that their trial does not have."""
_FEW = 6
"""So many values of a number get a word each."""


def history_plot(trials: Sequence[SweepTrial], source: Source) -> Figure:
    """The score of every trial in its order, and the best so far."""
    figure = new_figure(8.0, 3.4, source)
    axes = figure.add_subplot()
    tidy(axes, "Trials", "trial", "best dev score of the trial")
    complete = [trial for trial in trials if trial.state == "complete"]
    pruned = [trial for trial in trials if trial.state == "pruned"]
    axes.plot(_numbers(complete), _scores(complete), "o", color=BLUE, markersize=5, label="complete")
    axes.plot(
        _numbers(pruned),
        _scores(pruned),
        "o",
        color=GREY,
        markersize=5,
        markerfacecolor="white",
        label="pruned",
    )
    if complete:
        ordered = sorted(complete, key=lambda trial: trial.number)
        best = np.maximum.accumulate(_scores(ordered))
        axes.step(_numbers(ordered), best, where="post", color=VERMILION, label="best so far")
    legend(axes, loc="lower right")
    return figure


def curves_plot(trials: Sequence[SweepTrial], source: Source) -> Figure | None:
    """Dev score by evaluation: the best trials in colour, the others behind them."""
    if all(len(trial.curve) < 2 for trial in trials):
        return None
    figure = new_figure(8.0, 3.6, source)
    axes = figure.add_subplot()
    tidy(axes, "Dev score over each trial", "evaluation", "dev score")
    ranked = sorted(
        (trial for trial in trials if trial.state == "complete"), key=lambda trial: -(trial.score or 0.0)
    )
    shown = {trial.number: place for place, trial in enumerate(ranked[:5])}
    for trial in sorted(trials, key=lambda trial: shown.get(trial.number, -1)):
        steps, values = list(trial.curve), list(trial.curve.values())
        if trial.number in shown:
            place = shown[trial.number]
            axes.plot(
                steps,
                values,
                "o-",
                markersize=3,
                color=_COLOURS(place / 5),
                zorder=3,
                label=f"trial {trial.number}: {trial.score:.4f}",
            )
        else:
            dashed = trial.state == "pruned"
            axes.plot(
                steps,
                values,
                ":" if dashed else "-",
                color="#BBBBBB",
                marker="x" if dashed else "",
                markersize=3,
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5), title="dotted: pruned", title_fontsize=8)
    return figure


def parallel_plot(
    trials: Sequence[SweepTrial], names: Sequence[str], log_scales: Collection[str], source: Source
) -> Figure | None:
    """Every trial as a line through its parameters' values to its score."""
    if not names:
        return None
    complete = sorted((t for t in trials if t.state == "complete"), key=lambda trial: trial.score or 0.0)
    pruned = [trial for trial in trials if trial.state == "pruned"]
    figure = new_figure(max(6.0, 1.35 * (len(names) + 1) + 1.0), 4.4, source)
    axes = figure.add_subplot()
    axes.set_title("Parameters and score", size=11, loc="left")
    axes.axis("off")
    scores = _scores(complete) or [0.0]
    low, high = min(scores), max(scores)
    high = high if high > low else low + 1e-6
    colours = Normalize(low, high)
    scales = [
        _Scale([t.values[name] for t in trials if name in t.values], name in log_scales) for name in names
    ]
    for place, (name, scale) in enumerate(zip(names, scales, strict=True)):
        _axis(axes, place, name, scale.ticks())
    _axis(
        axes,
        len(names),
        "score",
        [(share, f"{low + share * (high - low):.3f}") for share in (0, 0.25, 0.5, 0.75, 1)],
    )
    absent = any(name not in trial.values for trial in [*pruned, *complete] for name in names)
    for trial in [*pruned, *complete]:
        points = [
            (place, scale.share(trial.values[name]) if name in trial.values else _ABSENT)
            for place, (name, scale) in enumerate(zip(names, scales, strict=True))
        ]
        done = trial.state == "complete"
        if done:
            points.append((len(names), colours(trial.score or 0.0)))
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=_COLOURS(colours(trial.score or 0.0)) if done else "#CCCCCC",
            linewidth=1.4 if done else 0.7,
            alpha=0.85 if done else 0.6,
            zorder=2 if done else 1,
        )
    axes.set_xlim(-0.3, len(names) + 0.55)
    if absent:
        axes.text(-0.25, _ABSENT, "not in the trial", size=7, color=GREY, va="center")
    axes.set_ylim(_ABSENT - 0.06 if absent else -0.06, 1.16)
    bar = figure.colorbar(ScalarMappable(colours, _COLOURS), ax=axes, fraction=0.03, pad=0.01)
    bar.set_label("dev score (grey: pruned)", size=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _axis(axes: Axes, place: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([place, place], [0, 1], color=BLACK, linewidth=0.8, zorder=3)
    axes.text(place, 1.06, _cut(name), ha="center", va="bottom", size=8, rotation=12, parse_math=False)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for share, text in ticks:
        axes.plot([place - 0.02, place + 0.02], [share, share], color=BLACK, linewidth=0.8, zorder=3)
        axes.text(place + 0.04, share, _cut(text), va="center", size=7, zorder=4, bbox=box, parse_math=False)


class _Scale:
    """From values of a parameter to 0..1, and ticks along it."""

    def __init__(self, values: Sequence[Any], log: bool) -> None:
        self.log = log
        self.numeric = bool(values) and all(
            isinstance(value, (int, float)) and not isinstance(value, bool) for value in values
        )
        self.labels = [] if self.numeric else sorted(set(map(str, values)))
        if self.numeric:
            ends = [self._number(value) for value in (min(values), max(values))]
            self.low, self.high = ends[0], ends[1] if ends[1] > ends[0] else ends[0] + 1e-9
            self.few = sorted(set(values)) if len(set(values)) <= _FEW else []

    def _number(self, value: float) -> float:
        return math.log10(value) if self.log and value > 0 else float(value)

    def share(self, value: Any) -> float:
        """Where the value stands."""
        if self.numeric:
            return (self._number(value) - self.low) / (self.high - self.low)
        return self.labels.index(str(value)) / max(len(self.labels) - 1, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and words."""
        if not self.numeric:
            return [(self.share(label), label) for label in self.labels]
        if self.few:
            return [(self.share(value), f"{value:.3g}") for value in self.few]
        shares = (0, 0.25, 0.5, 0.75, 1)
        values = [self.low + share * (self.high - self.low) for share in shares]
        return [
            (share, f"{10**value if self.log else value:.2g}")
            for share, value in zip(shares, values, strict=True)
        ]


def slice_plot(
    trials: Sequence[SweepTrial], names: Sequence[str], log_scales: Collection[str], source: Source
) -> Figure | None:
    """The score over each parameter by itself."""
    if not names:
        return None
    figure, all_axes = panels(len(names), source, width=4.2, height=3.0)
    for axes, name in zip(all_axes, names, strict=True):
        having = [trial for trial in trials if name in trial.values]
        numeric = all(
            isinstance(t.values[name], (int, float)) and not isinstance(t.values[name], bool) for t in having
        )
        tidy(axes, _cut(name, 40), "", "best dev score")
        if not having:
            empty(axes, "no trial has it")
            continue
        labels = [] if numeric else sorted({str(trial.values[name]) for trial in having})
        for state, colour, face in (("pruned", GREY, "white"), ("complete", BLUE, BLUE)):
            chosen = [trial for trial in having if trial.state == state]
            if numeric:
                places = [float(trial.values[name]) for trial in chosen]
            else:
                places = [
                    labels.index(str(trial.values[name])) + 0.24 * ((trial.number * 0.618) % 1 - 0.5)
                    for trial in chosen
                ]
            axes.plot(
                places,
                _scores(chosen),
                "o",
                color=colour,
                markerfacecolor=face,
                markersize=4.5,
                alpha=0.85,
                label=state,
            )
        if numeric:
            values = sorted({float(trial.values[name]) for trial in having})
            if name in log_scales:
                _log_axis(axes, values)
            elif len(values) <= _FEW:
                axes.set_xticks(values, [f"{value:.3g}" for value in values])
        else:
            axes.set_xticks(
                range(len(labels)),
                [_cut(label) for label in labels],
                rotation=20 if len(labels) > 3 else 0,
                parse_math=False,
            )
            axes.set_xlim(-0.5, len(labels) - 0.5)
            for place, label in enumerate(labels):
                scores = [t.score for t in having if t.state == "complete" and str(t.values[name]) == label]
                if scores:
                    mean = float(np.mean([score for score in scores if score is not None]))
                    axes.plot([place - 0.3, place + 0.3], [mean, mean], color=VERMILION, linewidth=1.5)
    legend(all_axes[0], loc="best")
    return figure


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log scale whose words never overlap: decades, or the ends and the middle of less than one and a half."""
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = math.log10(min(values)), math.log10(max(values))
    if high - low < 1.5:
        ticks = [
            float(f"{10**value:.1e}") for value in ([low, (low + high) / 2, high] if high > low else [low])
        ]
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])


def importance_plot(
    importances: Mapping[str, float], conditional: Mapping[str, float], method: str, source: Source
) -> Figure:
    """The share of each parameter in what makes scores differ; conditional ones among the trials that have them."""
    shares = sorted((dict(importances) | dict(conditional)).items(), key=lambda item: -item[1])
    figure = new_figure(6.5, 1.3 + 0.3 * len(shares), source)
    axes = figure.add_subplot()
    tidy(axes, "Importance", f"importance ({method}, complete trials)", "")
    for kind, colour, label in (
        (importances, BLUE, "of all trials"),
        (conditional, SKY, "among the trials that have it"),
    ):
        places = [place for place, (name, _) in enumerate(shares) if name in kind]
        axes.barh(places, [shares[place][1] for place in places], color=colour, height=0.62, label=label)
    for place, (_, value) in enumerate(shares):
        axes.text(value + 0.005, place, f"{value:.2f}", va="center", size=8)
    axes.set_yticks(range(len(shares)), [_cut(name, 40) for name, _ in shares], parse_math=False)
    axes.set_xlim(0, max(value for _, value in shares) * 1.15 + 0.01)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    if conditional:
        legend(axes, loc="lower right")
    return figure


def _numbers(trials: Sequence[SweepTrial]) -> list[int]:
    return [trial.number for trial in trials]


def _scores(trials: Sequence[SweepTrial]) -> list[float]:
    return [trial.score for trial in trials if trial.score is not None]


def _cut(text: str, limit: int = _LABEL) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"

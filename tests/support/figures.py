"""Whether a figure can be read: no text lies on another or outside the picture."""

from __future__ import annotations

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from mtbert.evaluation.plots.style import Source

SOURCE = Source("a_run $with$ signs", "0123456789ab-dirty")


def texts_of(figure: Figure) -> list[Text]:
    """The visible texts. Tick labels outside their axis' range are not drawn and do not count."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low <= tick.get_loc() <= high:
                    hidden |= {id(tick.label1), id(tick.label2)}
    return [text for text in drawn if id(text) not in hidden]


def check(figure: Figure, source: Source = SOURCE) -> None:
    """Assert that every text is legible, that the footer is there, and that every panel has a title and an x label."""
    texts = texts_of(figure)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts]
    for (first, a), (second, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 1.0, f"{first!r} lies on {second!r}"
    width, height = canvas.get_width_height()
    for text, box in boxes:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{text!r} is cut off at {box}"
    footer = [text for text, _ in boxes if source.git in text]
    assert footer
    for axes in figure.axes:
        if axes.get_label() != "<colorbar>":
            assert axes.get_xlabel()
            assert axes.get_title() or axes.get_title(loc="left")

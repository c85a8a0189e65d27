"""The histograms before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from mtbert.evaluation.baselines import label_histogram
from mtbert.evaluation.plots.augmentation import added_labels
from mtbert.evaluation.plots.style import Source, save
from mtbert.tasks.registry import get_task


@pytest.mark.parametrize(
    ("name", "own", "new"), [("sst", [0, 0, 3], [3, 4]), ("sts", [0.0, 4.9, 5.0], [0.1])]
)
def test_bars_show_own_and_added_rows(tmp_path: Path, name: str, own: list[float], new: list[float]) -> None:
    task = get_task(name)
    before, added = (label_histogram(task, np.array(labels)) for labels in (own, new))
    assert before is not None
    assert added is not None
    figure = added_labels(task, before, added, Source("run", "commit"))
    heights = [
        [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in figure.axes
    ]
    assert heights == [before["counts"], before["counts"] + added["counts"]]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert save(figure, tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG")

"""Figures: every one carries run and commit, and no text lies on another or outside the picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.figures import SOURCE, check

from mtbert.errors import UserError
from mtbert.evaluation.bootstrap import Difference
from mtbert.evaluation.history import History, read_history
from mtbert.evaluation.metrics import score
from mtbert.evaluation.plots.compare_plots import difference_plot, loss_overlay, metric_overlay
from mtbert.evaluation.plots.confusion import confusion_plot
from mtbert.evaluation.plots.curves import loss_curves, metric_curves, optimiser_curves, speed_plot
from mtbert.evaluation.plots.labels import label_histograms
from mtbert.evaluation.plots.similarity import similarity_plot
from mtbert.evaluation.plots.style import Source, save, smoothed
from mtbert.evaluation.predictions import Predictions
from mtbert.evaluation.run import read_run, run_baselines
from mtbert.tasks.registry import TASKS

FOUR = {name: TASKS[name] for name in ("sst", "para", "sts", "cfimdb")}


def predictions_for(name: str, count: int = 600) -> Predictions:
    task, generator = TASKS[name], np.random.default_rng(0)
    labels = generator.uniform(0, 5, count) if name == "sts" else generator.integers(0, task.classes, count)
    outputs = generator.normal(size=(count, task.outputs))
    return Predictions(name, "dev", tuple(map(str, range(count))), labels, outputs)


@pytest.fixture
def history(make_run) -> History:
    return read_history(make_run("run", names=tuple(FOUR)) / "metrics.jsonl")


@pytest.mark.parametrize("names", [("sst",), ("sst", "para", "sts"), tuple(FOUR)])
def test_curves_of_a_run(make_run, names: tuple[str, ...]) -> None:
    run = read_run(make_run("run", names=names))
    tasks = {name: TASKS[name] for name in names}
    check(loss_curves(run.history, tasks, SOURCE))
    check(metric_curves(run.history, tasks, run_baselines(run, tasks), SOURCE))
    check(optimiser_curves(run.history, SOURCE))
    check(speed_plot(run.history, SOURCE))


def test_curves_show_the_recorded_numbers(history: History) -> None:
    run_tasks = {"sst": TASKS["sst"]}
    (panel,) = loss_curves(history, run_tasks, SOURCE).axes
    by_label = {line.get_label(): line for line in panel.lines}
    assert list(by_label["dev"].get_ydata()) == history.dev_losses("sst")[1]
    raw = panel.lines[0]
    assert list(raw.get_ydata()) == history.losses("sst")[1]
    seconds, _ = speed_plot(history, SOURCE).axes
    assert [bar.get_height() for bar in seconds.patches] == [time.seconds for time in history.epoch_times()]


def test_the_baseline_is_a_dashed_line(make_run) -> None:
    run = read_run(make_run("run"))
    tasks = {name: TASKS[name] for name in run.tasks}
    base = run_baselines(run, tasks)
    panels = metric_curves(run.history, tasks, base, SOURCE).axes[::2]
    for panel, (name, _) in zip(panels, tasks.items(), strict=True):
        dashed = [line for line in panel.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata()[0] for line in dashed] == [base[name].majority]


def test_the_second_metric_and_the_classes_stand_under_the_headline(make_run) -> None:
    run = read_run(make_run("run"))
    tasks = {name: TASKS[name] for name in run.tasks}
    panels = metric_curves(run.history, tasks, {}, SOURCE).axes
    for above, below, task in zip(panels[::2], panels[1::2], tasks.values(), strict=True):
        assert above.get_position().y0 > below.get_position().y1
        assert above.get_position().x0 == pytest.approx(below.get_position().x0, abs=0.01)
        curves = {line.get_label(): list(line.get_ydata()) for line in below.lines}
        metric = "spearman" if task.kind == "similarity" else "macro_f1"
        for split in ("train", "dev"):
            assert curves.pop(split) == run.history.scores(split, task.name, metric)[1]
        assert list(curves) == list(task.class_names)
        last = run.history.evaluations[-1]["dev"][task.name].get("classes", [])
        assert [values[-1] for values in curves.values()] == [row["f1"] for row in last]


def test_a_task_with_many_classes_gets_no_line_for_each() -> None:
    classes = [{"name": str(number), "f1": 0.5} for number in range(6)]
    scores = {"sst": {"accuracy": 0.5, "macro_f1": 0.5, "classes": classes}}
    history = History(evaluations=[{"kind": "evaluation", "step": 1, "dev": scores}])
    _, below = metric_curves(history, {"sst": TASKS["sst"]}, {}, SOURCE).axes
    assert [line.get_label() for line in below.lines] == ["dev"]


def test_a_part_of_an_epoch_gets_a_narrow_bar() -> None:
    ends = ((1.0, 40), (2.0, 80), (2.375, 95))
    lines = [
        {"kind": "epoch", "step": step, "epoch": epoch, "seconds": 10.0 * epoch, "tokens": 1000 * step}
        for epoch, step in ends
    ]
    for cached in (False, True):
        figure = speed_plot(History(epochs=lines), SOURCE, cached=cached)
        check(figure)
        for panel in figure.axes:
            bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in panel.patches]
            for (left, right), start, end in zip(bars, (0, 1, 2), (1, 2, 2.375), strict=True):
                assert start < left < right < end
        assert ("features cached" in figure.axes[1].get_ylabel()) == cached


def test_histories_with_little_in_them() -> None:
    step = {"kind": "step", "step": 1, "loss": {"sst": 1.0}, "lr": 1e-5, "grad_norm": 1.0}
    evaluation = {
        "kind": "evaluation",
        "step": 1,
        "dev": {"sst": {"accuracy": 0.2}},
        "dev_loss": {"sst": 1.5},
    }
    epoch = {"kind": "epoch", "step": 1, "epoch": 0.5, "seconds": 0.0, "tokens": 0}
    for history in (History(), History([step], [evaluation], [epoch])):
        check(loss_curves(history, FOUR, SOURCE))
        check(metric_curves(history, FOUR, {}, SOURCE))
        check(optimiser_curves(history, SOURCE))
        check(speed_plot(history, SOURCE))


@pytest.mark.parametrize("name", ["sst", "para", "cfimdb"])
def test_confusion_matrix_cells(name: str) -> None:
    entry = predictions_for(name, 1234)
    assert entry.labels is not None
    scores = score(TASKS[name], entry.labels, entry.outputs)
    figure = confusion_plot(TASKS[name], scores, SOURCE)
    check(figure)
    cells = {text.get_text() for text in figure.axes[0].texts}
    row = scores.confusion[0]
    assert f"{row[0]:,}\n{row[0] / sum(row):.0%}" in cells
    assert len(figure.axes[0].texts) == TASKS[name].classes ** 2


@pytest.mark.parametrize("count", [2, 50, 5000])
def test_similarity(count: int) -> None:
    entry = predictions_for("sts", count)
    assert entry.labels is not None
    scores = score(TASKS["sts"], entry.labels, entry.outputs)
    figure = similarity_plot(TASKS["sts"], entry.labels, entry.outputs[:, 0], scores, SOURCE)
    check(figure)
    (identity,) = figure.axes[0].lines
    assert list(identity.get_xdata()) == list(identity.get_ydata())


def test_label_histograms(make_run) -> None:
    run = read_run(make_run("run", names=tuple(FOUR)))
    histograms = {
        name: {split: run.data(name, split)["labels"] for split in ("train", "dev")} for name in FOUR
    }
    histograms["cfimdb"] = {}
    figure = label_histograms(FOUR, histograms, SOURCE)
    check(figure)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert sum(heights) == pytest.approx(2.0)  # shares of train and of dev


@pytest.mark.parametrize("count", [2, 8])
def test_overlays_of_runs(make_run, count: int) -> None:
    runs = [read_run(make_run(f"run-with-a-rather-long-name-{i}", seed=i)) for i in range(count)]
    names = [run.name for run in runs]
    tasks = {name: TASKS[name] for name in ("sst", "para", "sts")}
    source = Source(", ".join(names), "0123456789ab-dirty")
    for draw in (loss_overlay, metric_overlay):
        for chosen in (tasks, {"sst": TASKS["sst"]}):
            check(draw(runs, names, chosen, source), source)
    differences = [
        {
            name: Difference(0.5, 0.6, 0.1 * place, 0.1 * place - 0.05, 0.1 * place + 0.05, 0.1)
            for name in tasks
        }
        for place in range(1, count)
    ]
    titles = {name: task.title for name, task in tasks.items()}
    check(difference_plot(differences, names, titles, source), source)


def test_a_footer_too_long_is_shortened_but_keeps_the_commit() -> None:
    source = Source("name " * 200, "0123456789ab-dirty")
    check(optimiser_curves(History(), source), source)


def test_files_are_pngs_of_100_dots_an_inch(tmp_path: Path) -> None:
    figure = optimiser_curves(History(), SOURCE)
    path = save(figure, tmp_path / "plots" / "x.png")
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[place : place + 4], "big") for place in (16, 20))
    assert (width, height) == tuple(round(100 * size) for size in figure.get_size_inches())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(figure, tmp_path / "file" / "x.png")


def test_pyplot_is_never_imported() -> None:
    modules = "mtbert.evaluation.plots, mtbert.evaluation.comparison"
    code = f"import sys, {modules}; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_smoothing_keeps_length_and_constants() -> None:
    assert smoothed([2.0] * 9, 4) == [2.0] * 9
    assert smoothed([0.0, 3.0, 0.0], 2) == [1.5, 1.0, 1.5]

"""What history, report and figures make of objectives, the tasks' gradients, embeddings and phases."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.figures import SOURCE, check

from mtbert.evaluation.forgetting import backward_transfer, phase_rows, phases
from mtbert.evaluation.history import History, read_history
from mtbert.evaluation.plots.method_plots import (
    embedding_curves,
    forgetting_plot,
    gradient_curves,
    objective_curves,
    weight_curves,
)
from mtbert.evaluation.report import write_report
from mtbert.evaluation.run import read_run
from mtbert.tasks.registry import TASKS

TRIO = {name: TASKS[name] for name in ("sst", "para", "sts")}


def step_line(step: int, **extra: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": step,
        "epoch": step / 100,
        "loss": {},
        "lr": 1e-5,
        "grad_norm": 1.0,
        **extra,
    }


def gradients(cosine: float, altered: float, steps: int) -> dict[str, Any]:
    pairs = ("sst/para", "sst/sts", "para/sts")
    backwards = ("para/sst", "sts/sst", "sts/para")
    return {
        "cosine": {pair: cosine * place for place, pair in enumerate(pairs, start=1)},
        "norm": {"sst": 2.0, "para": 1.0 + cosine, "sts": 0.0},
        "conflict": dict.fromkeys(pairs, altered),
        "altered": dict.fromkeys(pairs, altered) | dict.fromkeys(backwards, 0.5 * altered),
        "steps": steps,
    }


def evaluation(step: int, phase: str | None, sst: float, para: float, sts: float) -> dict[str, Any]:
    scores = {"sst": {"accuracy": sst}, "para": {"accuracy": para}, "sts": {"pearson": sts}}
    line = {"kind": "evaluation", "step": step, "epoch": step / 100, "dev": scores, "score": sst}
    return line if phase is None else line | {"phase": phase}


# Two epochs of para, sts, sst, with an evaluation in between that ends no phase.
PHASES = [
    evaluation(30, "para", 0.20, 0.80, 0.10),
    evaluation(40, "sts", 0.22, 0.75, 0.85),
    evaluation(100, "sst", 0.50, 0.70, 0.80),
    evaluation(110, None, 0.10, 0.10, 0.10),
    evaluation(130, "para", 0.45, 0.82, 0.70),
    evaluation(140, "sts", 0.44, 0.79, 0.88),
    evaluation(200, "sst", 0.53, 0.76, 0.84),
]


def rich_history() -> History:
    steps = [
        step_line(
            10 * place,
            objective={"sts/simcse": 2.0 / place, "sst/a_b": 0.1},
            gradients=gradients(0.1 * (-1) ** place, place / 20, 10),
            weights={"sst": 1.0 / place, "sts": 0.5 * place},
        )
        for place in range(1, 21)
    ]
    lines = [
        line | {"embedding": {"alignment": 1.0 - line["step"] / 400, "uniformity": -line["step"] / 100}}
        for line in PHASES
    ]
    return History(steps, lines)


def test_history_reads_what_is_there(tmp_path: Path) -> None:
    lines = [
        step_line(10),
        step_line(20, objective={"sts/simcse": 0.5}, gradients=gradients(0.2, 1.0, 30)),
        step_line(30, objective={"sst/mnrl": 1.5, "sts/simcse": None}, gradients=gradients(-0.4, 0.0, 10)),
        step_line(40, gradients={"cosine": {"sst/para": 0.6}}),
        evaluation(40, "sst", 0.1, 0.2, 0.3) | {"embedding": {"alignment": None, "uniformity": -2.0}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(path)
    assert history.objectives() == ["sts/simcse", "sst/mnrl"]
    assert history.objective("sts/simcse") == ([20.0], [0.5])
    assert history.gradient_names("cosine") == ["sst/para", "sst/sts", "para/sts"]
    assert history.gradients("cosine", "sst/sts") == ([20.0, 30.0], [0.4, -0.8])
    # Lines count by their steps; one that does not say how many counts as one.
    assert history.gradient_mean("cosine", "sst/para") == pytest.approx((30 * 0.2 - 10 * 0.4 + 0.6) / 41)
    assert history.gradient_mean("altered", "sts/para") == pytest.approx(0.5 * 30 / 40)
    assert history.gradient_mean("altered", "sts/nothing") is None
    assert history.embedding("uniformity") == ([40.0], [-2.0])
    assert history.embedding("alignment") == ([], [])
    assert [line["step"] for line in history.phases()] == [40]
    empty = History([step_line(10)], [evaluation(10, None, 0.1, 0.1, 0.1)])
    assert (
        empty.objectives() == empty.gradient_names("norm") == empty.weighted_tasks() == empty.phases() == []
    )


def test_phases_and_their_changes() -> None:
    found = phases(History(evaluations=PHASES), TRIO)
    assert [phase.task for phase in found] == ["para", "sts", "sst"] * 2
    expected: list[dict[str, float]] = [
        {},
        {"para": -0.05},
        {"para": -0.10, "sts": -0.05},
        {"sst": -0.05, "sts": -0.15},
        {"sst": -0.06, "para": -0.03},
        {"para": -0.06, "sts": -0.04},
    ]
    for phase, changes in zip(found, expected, strict=True):
        assert dict(phase.changes) == pytest.approx(changes)
    assert backward_transfer(found) == pytest.approx((-0.06 - 0.04) / 2)
    assert backward_transfer(found[:1]) is None
    assert backward_transfer([]) is None
    headers, rows = phase_rows(found, TRIO)
    assert headers == ["epoch", "after", "sst accuracy", "para accuracy", "sts Pearson"]
    assert rows[0] == ["0.3", "para", "0.200", "0.800 (own)", "0.100"]
    assert rows[3] == ["1.3", "para", "0.450 (-0.050)", "0.820 (own)", "0.700 (-0.150)"]


def test_figures_can_be_read_and_show_the_numbers() -> None:
    history = rich_history()
    figure = objective_curves(history, SOURCE)
    check(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sts/simcse", "sst/a_b"]
    assert list(figure.axes[0].lines[0].get_ydata()) == history.objective("sts/simcse")[1]

    figure = gradient_curves(history, SOURCE)
    check(figure)
    cosines, norms, altered = figure.axes
    curves = {line.get_label(): line for line in cosines.lines}
    assert list(curves["para/sts"].get_ydata()) == history.gradients("cosine", "para/sts")[1]
    norm_labels = {line.get_label() for line in norms.lines}
    assert norm_labels == {"sst", "para"}  # a norm of 0 has no logarithm
    both = {line.get_label(): line for line in altered.lines}
    assert len(both) == 6
    assert both["sst/para"].get_color() == both["para/sst"].get_color() == curves["sst/para"].get_color()
    assert both["sst/para"].get_linestyle() != both["para/sst"].get_linestyle()

    figure = weight_curves(history, SOURCE)
    check(figure)
    weights = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert weights == {task: history.weights(task)[1] for task in ("sst", "sts")}
    close = History([step_line(step, weights={"sst": 1 + step / 1e4, "sts": 0.5}) for step in range(1, 99)])
    check(weight_curves(close, SOURCE))  # within a decade

    figure = embedding_curves(history, SOURCE)
    check(figure)
    assert list(figure.axes[1].lines[0].get_ydata()) == history.embedding("uniformity")[1]

    found = phases(history, TRIO)
    figure = forgetting_plot(found, TRIO, SOURCE)
    check(figure)
    sst = figure.axes[0]
    assert list(sst.lines[0].get_ydata()) == [0.20, 0.22, 0.50, 0.45, 0.44, 0.53]
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in sst.patches)
    assert spans == [(40, 100), (140, 200)]


def test_figures_of_many_points_tasks_and_gaps() -> None:
    names = ("sst", "para", "sts", "cfimdb")
    pairs = [f"{a}/{b}" for place, a in enumerate(names) for b in names[place + 1 :]]
    steps = [
        step_line(
            step,
            objective={f"{name}/simcse": 1.0 / step for name in names},
            gradients={
                "cosine": {pair: (step % 7 - 3) / 10 for pair in pairs},
                "norm": {name: 10.0 ** (place - 2) for place, name in enumerate(names)},
                "altered": {f"{a}/{b}": (step % 3) / 2 for a in names for b in names if a != b},
            },
        )
        for step in range(1, 200)
    ]
    history = History(steps)
    check(objective_curves(history, SOURCE))
    check(gradient_curves(history, SOURCE))
    plain = History(
        [step_line(1, gradients={"cosine": {"sst/para": 0.5}, "norm": {"sst": 1.0, "para": 2.0}})]
    )
    figure = gradient_curves(plain, SOURCE)
    check(figure)
    assert len(figure.axes) == 2  # nothing was altered
    check(embedding_curves(History(evaluations=[PHASES[0] | {"embedding": {"uniformity": -1.0}}]), SOURCE))
    check(forgetting_plot(phases(History(evaluations=PHASES[:1]), TRIO), {"sst": TRIO["sst"]}, SOURCE))


def test_the_report_has_the_sections_and_their_figures(make_run) -> None:
    folder = make_run("run", history=False, predicted=False)
    history = rich_history()
    lines = [*history.steps, *history.evaluations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(folder, TASKS).read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    place = titles.index("Objectives")
    assert titles[place : place + 5] == [
        "Objectives",
        "Gradients",
        "Learned weights",
        "Alignment and uniformity",
        "Forgetting",
    ]
    assert "| sts/simcse | 2.0000 | 0.1000 | 0.1000 |" in page
    assert "| sst/a\\_b | 0.1000 | 0.1000 | 0.1000 |" in page
    assert "| sst/para | 0.000 | 52.5% | 52.5% | 26.2% |" in page
    assert "| sst | 2.000 |" in page
    assert "| sts | 0.500 | 10.000 | 0.500 | 10.000 |" in page
    assert "| 2 (best) | 200 | 0.500 | -2.000 |" in page
    assert "| 1.4 | sts | 0.440 (-0.060) | 0.790 (-0.030) | 0.880 (own) |" in page
    assert "At the end the tasks are -0.050 from there on average" in page
    for name in ("objectives", "gradients", "weights", "embedding", "forgetting"):
        assert f"![{name}](plots/{name}.png)" in page
        assert (folder / "plots" / f"{name}.png").is_file()


def test_a_plain_run_has_none_of_them(make_run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run("run")
    drawn: list[dict] = []
    monkeypatch.setattr(
        "mtbert.evaluation.plots.run_plots.save", lambda figure, path: drawn.append({}) or path
    )
    page = write_report(folder, TASKS).read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert not {"Objectives", "Gradients", "Learned weights", "Alignment and uniformity", "Forgetting"} & set(
        titles
    )
    assert len(drawn) == 10
    assert read_run(folder).history.phases() == []

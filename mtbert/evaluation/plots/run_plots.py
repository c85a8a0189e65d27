"""All figures of one run, from its folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtbert.evaluation.forgetting import phases
from mtbert.evaluation.halves import SELECTION_HALF, WHOLE, reported
from mtbert.evaluation.plots.calibration import reliability_plot
from mtbert.evaluation.plots.confusion import confusion_plot
from mtbert.evaluation.plots.curves import loss_curves, metric_curves, optimiser_curves, speed_plot
from mtbert.evaluation.plots.labels import label_histograms
from mtbert.evaluation.plots.method_plots import (
    embedding_curves,
    forgetting_plot,
    gradient_curves,
    objective_curves,
    weight_curves,
)
from mtbert.evaluation.plots.profile_plot import profile_plot
from mtbert.evaluation.plots.similarity import similarity_plot
from mtbert.evaluation.plots.style import Source, save
from mtbert.evaluation.predictions import predictions_from_outputs
from mtbert.evaluation.results import Results
from mtbert.evaluation.run import Run, run_baselines

if TYPE_CHECKING:
    from mtbert.evaluation.calibration import CalibrationReport
    from mtbert.evaluation.predictions import Predictions
    from mtbert.tasks.registry import Task


def write_plots(
    run: Run,
    tasks: Mapping[str, Task],
    predictions: Mapping[str, Predictions],
    results: Results,
    calibrations: Mapping[str, CalibrationReport],
) -> dict[str, Path]:
    """Write plots/*.png into the run's folder and return their paths by name; what has no data is left out.

    `tasks` are the run's own. Names: `losses`, `metrics`, `objectives`, `gradients`, `weights`, `embedding`,
    `forgetting`, `optimiser`, `speed`, `profile`, `labels`, `confusion-TASK`, `reliability-TASK` and `similarity-TASK`.
    """
    source = Source(run.name, run.git)
    history, drawn = run.history, {}
    dev = SELECTION_HALF if run.halved else WHOLE
    if history.steps or history.evaluations:
        drawn["losses"] = loss_curves(history, tasks, source, dev=dev)
    if history.evaluations:
        drawn["metrics"] = metric_curves(history, tasks, run_baselines(run, tasks), source, dev=dev)
    if history.objectives():
        drawn["objectives"] = objective_curves(history, source)
    if history.gradient_names("cosine") or history.gradient_names("norm"):
        drawn["gradients"] = gradient_curves(history, source)
    if history.weighted_tasks():
        drawn["weights"] = weight_curves(history, source)
    if history.embedding("uniformity")[0]:
        drawn["embedding"] = embedding_curves(history, source)
    finished = phases(history, tasks)
    if finished:
        drawn["forgetting"] = forgetting_plot(finished, tasks, source, dev=dev)
    predictions = reported(predictions, run.halved)
    for name, task in tasks.items():
        scores, entry = results.scores.get(name), predictions.get(name)
        if scores is None or entry is None or entry.labels is None or not scores.examples:
            continue
        if task.kind == "similarity":
            predicted = predictions_from_outputs(task, entry.outputs)
            drawn[f"similarity-{name}"] = similarity_plot(
                task, entry.labels, predicted, scores, source, results.split
            )
        else:
            drawn[f"confusion-{name}"] = confusion_plot(task, scores, source, results.split)
            if name in calibrations:
                drawn[f"reliability-{name}"] = reliability_plot(
                    task, calibrations[name], source, results.split
                )
    histograms = {
        name: {split: run.data(name, split).get("labels") or {} for split in ("train", "dev")}
        for name in tasks
    }
    if any(any(splits.values()) for splits in histograms.values()):
        drawn["labels"] = label_histograms(tasks, histograms, source)
    if history.steps:
        drawn["optimiser"] = optimiser_curves(history, source)
    if history.epochs:
        drawn["speed"] = speed_plot(history, source, cached=run.features_cached)
    if run.profile is not None:
        drawn["profile"] = profile_plot(run.profile, source)
    return {name: save(figure, run.folder / "plots" / f"{name}.png") for name, figure in drawn.items()}

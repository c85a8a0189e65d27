"""Loss curves of bf16 against float32, and of a planted error beside them.

    python -m bench.precision_curves --data DIR     docs/precision.png and docs/precision-curves.json
    python -m bench.precision_curves --plot         the picture of the recorded curves again

The first steps of fine-tuning MiniLM on three tasks: for every seed the same initial heads, batches and dropout masks
in every precision. The planted error keeps the master weights in bfloat16, as a bf16 path without float32 weights does:
updates smaller than half a bfloat16 step are lost. It must leave the band that the seeds span; bf16 must not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from mtbert.config import TrainConfig
from mtbert.engine.assembly import assemble
from mtbert.engine.environment import environment
from mtbert.engine.precision import Precision, product_settings
from mtbert.engine.step import TrainStep
from mtbert.evaluation.plots.style import BLUE, GREY, VERMILION, Source, panels, save
from mtbert.model.heads import HeadConfig
from mtbert.optim.schedule import factor, set_learning_rate
from mtbert.tasks.config import TaskConfig

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "precision-curves.json"
PICTURE = ROOT / "docs" / "precision.png"
FLOAT32, BF16, BROKEN = "float32", "bf16", "bf16, master weights in bf16"
SMOOTHED = 30
"""Steps of the moving average that is drawn and compared."""

AfterStep = Callable[[TrainStep], None]


@torch.no_grad()
def masters_in_bf16(step: TrainStep) -> None:
    """The planted error: round every trained parameter to bfloat16, as after each update of bfloat16 weights."""
    for parameter in step.parameters:
        parameter.copy_(parameter.to(torch.bfloat16))


KINDS: dict[str, tuple[Precision, AfterStep | None]] = {
    FLOAT32: ("float32", None),
    BF16: ("bf16", None),
    BROKEN: ("bf16", masters_in_bf16),
}


def loss_curve(config: TrainConfig, steps: int, after_step: AfterStep | None = None) -> list[float]:
    """The weighted sum of all losses in each of the first `steps` steps."""
    with product_settings(config.precision):
        parts = assemble(config)
        losses = []
        for number in range(steps):
            set_learning_rate(parts.train_step.optimizer, factor(config.schedule, number, steps))
            result = parts.train_step(parts.curriculum.next(), number, number / steps)
            result.check()
            losses.append(float(result.total))
            if after_step is not None:
                after_step(parts.train_step)
    return losses


def smoothed(curve: Sequence[float]) -> np.ndarray:
    """The moving average over SMOOTHED steps, of the steps that have so many before them."""
    return np.convolve(np.asarray(curve), np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")


def gap(curves: Sequence[Sequence[float]], others: Sequence[Sequence[float]]) -> float:
    """The greatest difference between the seeds' means of two smoothed curves."""
    means = [np.mean([smoothed(curve) for curve in each], axis=0) for each in (curves, others)]
    return float(np.abs(means[0] - means[1]).max())


def spread(curves: Sequence[Sequence[float]]) -> float:
    """The median over steps of how far the seeds' smoothed curves lie apart: the noise."""
    lines = np.stack([smoothed(curve) for curve in curves])
    return float(np.median(lines.max(0) - lines.min(0)))


def minilm_config(data: str) -> TrainConfig:
    """Like the preset `minilm`, with a third of its batches."""
    sizes = {"sst": 6, "para": 12, "sts": 5}
    config = TrainConfig(
        data=data, task={name: TaskConfig(batch_size=size, max_length=128) for name, size in sizes.items()}
    )
    config.task["sts"].head = HeadConfig(pooling="mean", pair=["cosine"])
    config.task["sts"].loss.weight = 3.0
    return config


def measure(data: str, seeds: int, steps: int) -> dict[str, object]:
    """Train every kind with every seed."""
    curves: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    begun = time.process_time()
    for seed in range(seeds):
        for kind, (precision, after_step) in KINDS.items():
            config = dataclasses.replace(minilm_config(data), seed=seed, precision=precision)
            curves[kind].append(loss_curve(config, steps, after_step))
            print(f"seed {seed}, {kind}: last {np.mean(curves[kind][-1][-SMOOTHED:]):.4f}", flush=True)
    return {
        "environment": environment("cpu"),
        "processor_seconds": round(time.process_time() - begun),
        "data": Path(data).name,
        "curves": {
            kind: [[round(loss, 5) for loss in each] for each in found] for kind, found in curves.items()
        },
    }


def draw(record: dict, path: Path) -> None:
    """Curves with the seeds' range on the left, their distance from float32 of the same seed on the right."""
    curves = record["curves"]
    seeds = len(curves[FLOAT32])
    source = Source(f"MiniLM on {record['data']}, {seeds} seeds", record["environment"]["git"])
    figure, (left, right) = panels(2, source, width=5.2, height=3.8)
    for kind, color in ((FLOAT32, GREY), (BF16, BLUE), (BROKEN, VERMILION)):
        lines = np.stack([smoothed(curve) for curve in curves[kind]])
        steps = np.arange(SMOOTHED, SMOOTHED + lines.shape[1])
        wide = 5.0 if kind == FLOAT32 else 1.5  # bf16 lies upon it
        left.plot(steps, lines.mean(0), color=color, label=kind, linewidth=wide)
        left.fill_between(steps, lines.min(0), lines.max(0), color=color, alpha=0.15, linewidth=0)
        if kind != FLOAT32:
            apart = lines - np.stack([smoothed(curve) for curve in curves[FLOAT32]])
            right.plot(steps, apart.mean(0), color=color, label=f"{kind} - float32")
            right.fill_between(steps, apart.min(0), apart.max(0), color=color, alpha=0.15, linewidth=0)
    right.axhspan(
        -spread(curves[FLOAT32]) / 2, spread(curves[FLOAT32]) / 2, color=GREY, alpha=0.2, linewidth=0
    )
    right.axhline(0.0, color=GREY, linewidth=0.8)
    left.set_title(f"Training loss, mean of {SMOOTHED} steps")
    right.set_title("Distance from float32 with the same seed")
    for panel in (left, right):
        panel.set_xlabel("step")
        panel.legend(fontsize=8)
    save(figure, path)


def main() -> None:
    """Measure, record, draw."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.precision_curves", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", default="sample", help="folder in the CS224N layout, or sample")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--plot", action="store_true", help="draw the recorded curves, measure nothing")
    options = parser.parse_args()
    if options.plot:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    else:
        record = measure(options.data, options.seeds, options.steps)
        RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw(record, PICTURE)
    curves = record["curves"]
    print(f"seeds of float32 lie {spread(curves[FLOAT32]):.4f} apart (median over steps)")
    for kind in (BF16, BROKEN):
        print(f"{kind}: at most {gap(curves[kind], curves[FLOAT32]):.4f} from float32")


if __name__ == "__main__":
    main()

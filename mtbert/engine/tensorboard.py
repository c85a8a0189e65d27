"""TensorBoard events beside metrics.jsonl, when tensorboard is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Listener = Callable[[dict[str, Any]], None]


def tensorboard_listeners(folder: Path) -> list[Listener]:
    """A listener that writes every record's numbers into `folder`/tensorboard; empty without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return []
    writer: Any = None

    def listen(record: dict[str, Any]) -> None:
        nonlocal writer
        if writer is None:  # a resumed run takes away what was drawn beyond its checkpoint
            writer = SummaryWriter(str(folder / "tensorboard"), purge_step=record["step"])
        for tag, value in scalars(record):
            writer.add_scalar(tag, value, record["step"])
        if record["kind"] != "step":
            writer.flush()

    return [listen]


def scalars(record: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of a record by their names."""
    if record["kind"] == "step":
        pairs = [(f"loss/{task}", value) for task, value in record["loss"].items()]
        pairs += [(f"objective/{name}", value) for name, value in record.get("objective", {}).items()]
        pairs += [(f"weight/{task}", value) for task, value in record.get("weights", {}).items()]
        cosines = record.get("gradients", {}).get("cosine", {})
        pairs += [(f"gradient_cosine/{tasks}", value) for tasks, value in cosines.items()]
        names = {"total_loss": "loss/total", "lr": "lr", "grad_norm": "grad_norm", "loss_scale": "loss_scale"}
        return pairs + [(tag, record[name]) for name, tag in names.items() if name in record]
    if record["kind"] == "epoch":
        return [("tokens_per_second", record["tokens_per_second"])]
    pairs = []
    for split in ("train", "dev"):
        for task, scores in record[split].items():
            for name in ("accuracy", "macro_f1", "pearson", "spearman"):
                if scores.get(name) is not None:
                    pairs.append((f"{split}/{task}/{name}", scores[name]))
    return pairs + [(f"dev/{name}", record[name]) for name in ("overall", "mean") if record[name] is not None]

"""Outputs of a task's examples without dropout, packed to the token budget, in the examples' order."""

from __future__ import annotations

import numpy as np
import torch

from mtbert.data.dataset import TaskData
from mtbert.data.packing import plan_passes
from mtbert.engine.distributed import ALONE, World
from mtbert.engine.forward import Forward
from mtbert.errors import DataError
from mtbert.kernels.casts import WeightCasts


def labels_of(data: TaskData) -> np.ndarray:
    """The labels `[n]` of a table that must have them. Raises DataError."""
    if data.labels is None:
        raise DataError(f"{data.table.path}: has no labels")
    return data.labels


@torch.inference_mode()
def infer(
    forward: Forward,
    data: TaskData,
    *,
    max_tokens: int,
    examples: np.ndarray | None = None,
    world: World = ALONE,
) -> np.ndarray:
    """Outputs `[n, outputs]` float32 of `examples` (default: all), whatever the order they are computed in.

    Examples are taken longest first: passes then hold rows of like length, and a budget that is too large
    for the memory fails at once instead of in the middle. Several ranks share the passes, which are those of one rank:
    the outputs are the same, and every rank gets all of them.
    """
    chosen = np.arange(len(data)) if examples is None else np.asarray(examples, dtype=np.int64)
    order = np.argsort(-data.lengths[chosen], kind="stable")
    if not len(chosen):
        return np.zeros((0, 1), dtype=np.float32)
    passes = [
        requests
        for chunk in np.array_split(order, max(1, len(order) // 2048))
        for requests in plan_passes({data.name: chosen[chunk]}, {data.name: data}, max_tokens)
    ]
    ends = np.cumsum([len(requests[0].examples) for requests in passes])
    outputs = np.zeros((len(chosen), forward.model.head(data.name).spec.outputs), dtype=np.float32)
    with WeightCasts():
        for number in world.share_of(len(passes)):
            found = forward(passes[number], None).outputs[data.name].float().cpu().numpy()
            outputs[order[ends[number] - len(found) : ends[number]]] = found
    return world.added(outputs)

"""Outputs and pooled rows of examples without dropout, packed to the token budget, in the examples' order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mtbert.data.dataset import TaskData
from mtbert.data.packing import Request, plan_passes
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
    casts: WeightCasts | None = None,
    world: World = ALONE,
) -> np.ndarray:
    """Outputs `[n, outputs]` float32 of `examples` (default: all), whatever the order they are computed in.

    casts: keeps the weights' casts of one call for the next. Several ranks share the passes, which are those of one
    rank: the outputs are the same, and every rank gets all of them.
    """
    chosen = np.arange(len(data)) if examples is None else np.asarray(examples, dtype=np.int64)
    outputs = np.zeros((len(chosen), forward.model.head(data.name).spec.outputs), dtype=np.float32)
    with casts or WeightCasts():
        for places, requests in _passes(data, chosen, max_tokens, world):
            outputs[places] = forward(requests, None).outputs[data.name].float().cpu().numpy()
    return world.added(outputs)


@torch.inference_mode()
def pooled_rows(
    forward: Forward,
    data: TaskData,
    *,
    max_tokens: int,
    casts: WeightCasts | None = None,
    world: World = ALONE,
) -> np.ndarray:
    """Pooled rows `[n * rows_per_example, C]` of all examples of a stream that the model has; see `infer`.

    float32, or float64 where the model computes in it.
    """
    each, width = data.rows_per_example, forward.model.encoder.config.hidden_size
    kind = np.float64 if forward.dtype == torch.float64 else np.float32
    rows = np.zeros((len(data), each, width), dtype=kind)
    with casts or WeightCasts():
        for places, requests in _passes(data, np.arange(len(data)), max_tokens, world):
            found = forward(requests, None).rows[data.name].cpu().numpy()
            rows[places] = found.reshape(-1, each, width)
    return world.added(rows).reshape(-1, width)


def _passes(
    data: TaskData, chosen: np.ndarray, max_tokens: int, world: World
) -> Iterator[tuple[np.ndarray, list[Request]]]:
    """This rank's passes over the chosen examples, each with the places of its examples among them.

    Examples are taken longest first: passes then hold rows of like length, and a budget that is too large
    for the memory fails at once instead of in the middle.
    """
    order = np.argsort(-data.lengths[chosen], kind="stable")
    passes = [
        requests
        for chunk in np.array_split(order, max(1, len(order) // 2048))
        for requests in plan_passes({data.name: chosen[chunk]}, {data.name: data}, max_tokens)
    ]
    ends = np.cumsum([len(requests[0].examples) for requests in passes])
    for number in world.share_of(len(passes)):
        requests = passes[number]
        yield order[ends[number] - len(requests[0].examples) : ends[number]], requests

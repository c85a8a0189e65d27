"""Dev tables in two halves: one to choose checkpoints and recipes on, the other to report them on.

The highest of many dev scores is optimistic: part of it is luck with the very examples that it was chosen by. A score
on examples that took no part in the choice is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from mtbert.evaluation.predictions import Predictions

Selection = Literal["dev", "half"]

WHOLE, SELECTION_HALF, REPORT_HALF = "dev", "selection half of dev", "report half of dev"

_SCORE_STRATA = 10


def selection_half(ids: Sequence[str], labels: np.ndarray | None = None) -> np.ndarray:
    """Which examples choose, bool [n]; the others report.

    Classes (int labels [n]) and, of scores (float labels [n]), ten equal ranges are halved by themselves, to one
    example; and so is the whole. In each of them the examples with the lowest hashes of their ids choose: a function
    of ids and labels alone, the same for every seed, run and order of rows. Another table with a few more rows has
    nearly the same halves. Rows that share id and label stay together.
    """
    strata = _strata(len(ids), labels)
    keys = np.array([_hash(name) for name in ids], dtype=np.uint64)
    chosen = np.zeros(len(ids), dtype=bool)
    seen = taken = 0
    for stratum in np.unique(strata):
        places = np.flatnonzero(strata == stratum)
        # Where a stratum is odd, the example in its middle goes to the side that has fewer so far.
        seen += len(places)
        wanted = seen // 2 - taken
        if wanted > 0:
            chosen[places] = keys[places] <= np.sort(keys[places])[wanted - 1]
        taken += int(chosen[places].sum())
    return chosen


def report_part(predictions: Predictions) -> Predictions:
    """The predictions of the examples that took no part in any choice."""
    kept = ~selection_half(predictions.ids, predictions.labels)
    return replace(
        predictions,
        ids=tuple(name for name, inside in zip(predictions.ids, kept, strict=True) if inside),
        labels=None if predictions.labels is None else predictions.labels[kept],
        outputs=predictions.outputs[kept],
    )


def reported(predictions: Mapping[str, Predictions], halved: bool) -> dict[str, Predictions]:
    """What a result is made of, by task: the report halves, or everything where dev is not `halved`."""
    return {name: report_part(entry) if halved else entry for name, entry in predictions.items()}


def _strata(count: int, labels: np.ndarray | None) -> np.ndarray:
    """The stratum of each example, int64 [n]."""
    if labels is None or not count:
        return np.zeros(count, dtype=np.int64)
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.floating):
        return labels.astype(np.int64)
    low, high = float(labels.min()), float(labels.max())
    shares = (labels - low) / (high - low) if high > low else np.zeros(count)
    return np.minimum((shares * _SCORE_STRATA).astype(np.int64), _SCORE_STRATA - 1)


def _hash(name: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(name.encode(), digest_size=8, person=b"mtbert halves").digest(), "big"
    )

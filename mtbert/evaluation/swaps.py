"""Whether a model says the same of a pair when its two sentences change places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from mtbert.errors import DataError
from mtbert.evaluation.files import write_text
from mtbert.evaluation.predictions import predictions_from_outputs, probabilities
from mtbert.outside_files import read_json_object

if TYPE_CHECKING:
    from mtbert.tasks.registry import Task

SWAPS_FILE = "swapped-pairs.json"
MOST_PAIRS = 2000
"""Pairs of a table that are swapped at the end of a run: a seeded sample."""


@dataclass(frozen=True)
class SwapConsistency:
    """Predictions of pairs beside those of the same pairs swapped."""

    kind: str
    pairs: int
    """How many were swapped."""
    of: int
    """How many there are."""
    changed: int | None
    """Pairs whose class is another one; None for scores."""
    mean_difference: float
    """Mean absolute difference: of the scores in label units, or of the probability that moves most."""
    largest_difference: float

    @property
    def changed_share(self) -> float | None:
        """The part of the pairs whose class is another one."""
        return None if self.changed is None else self.changed / max(self.pairs, 1)

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"changed_share": self.changed_share}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SwapConsistency:
        """What `to_json` gave. Raises KeyError for a field that is missing, TypeError for one of another kind."""
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        for name, value in fields.items():
            kinds = {"kind": (str,), "changed": (int, NoneType), "pairs": (int,), "of": (int,)}
            if type(value) not in kinds.get(name, (float, int)):
                raise TypeError(f"{name} is {value!r:.40}")
        return cls(**fields)

    def to_text(self) -> str:
        """In a sentence."""
        which = (
            f"{self.pairs:,} pairs"
            if self.pairs == self.of
            else f"a seeded sample of {self.pairs:,} of {self.of:,} pairs"
        )
        if not self.largest_difference:
            return (
                f"With their sentences swapped, nothing changes: the outputs of {which} are exactly the same."
            )
        moved = f"{self.mean_difference:.3f} on average and {self.largest_difference:.3f} at most"
        if self.changed is None:
            return f"With their sentences swapped, the scores of {which} differ by {moved}."
        return (
            f"With their sentences swapped, {self.changed_share:.1%} of {which} get another class"
            f" (probabilities differ by {moved})."
        )


def swap_consistency(
    task: Task, outputs: np.ndarray, swapped: np.ndarray, *, of: int | None = None
) -> SwapConsistency:
    """Compares outputs [n, k] of pairs with those of the swapped pairs. of: how many pairs these are a sample of.

    Raises NonFiniteError for outputs that are NaN or infinite.
    """
    count = len(outputs)
    first, second = (predictions_from_outputs(task, each) for each in (outputs, swapped))
    if task.kind == "similarity":
        changed, differences = None, np.abs(first.astype(np.float64) - second)
    else:
        changed = int((first != second).sum())
        differences = np.abs(probabilities(task, outputs) - probabilities(task, swapped)).max(
            axis=1, initial=0.0
        )
    mean = float(differences.mean()) if count else 0.0
    largest = float(differences.max(initial=0.0))
    return SwapConsistency(task.kind, count, count if of is None else of, changed, mean, largest)


def write_swaps(folder: Path, found: Mapping[str, SwapConsistency]) -> None:
    """Keep them in a run's folder, for its report."""
    text = json.dumps({name: each.to_json() for name, each in found.items()}, indent=2)
    write_text(folder / SWAPS_FILE, text + "\n")


def read_swaps(folder: Path) -> dict[str, SwapConsistency]:
    """Those of a run's folder by task; none where it has no such file. DataError for a damaged one."""
    path = folder / SWAPS_FILE
    if not path.is_file():
        return {}
    found = {}
    for name, values in read_json_object(path, DataError).items():
        try:
            found[name] = SwapConsistency.from_json(values)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: {name[:80]}: cannot be read: {error!s:.80}") from None
    return found

"""Which texts of a table are the same, which are paraphrases of each other, and which are known not to be."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mtbert.data.batching import counter_generator
from mtbert.data.tokenisation import TokenisedTable
from mtbert.errors import ConfigError
from mtbert.tasks.registry import Task


def text_identities(tokenised: TokenisedTable) -> np.ndarray:
    """A number for each text, int64 [examples, texts per example]: equal where the encoder reads the same tokens.

    Numbers count the different texts from 0 in the order of their first occurrence.
    """
    tokens, offsets = np.ascontiguousarray(tokenised.tokens), tokenised.offsets.tolist()
    seen: dict[bytes, int] = {}
    numbers = [
        seen.setdefault(tokens[offsets[t] : offsets[t + 1]].tobytes(), len(seen))
        for t in range(len(offsets) - 1)
    ]
    return np.array(numbers, dtype=np.int64).reshape(-1, tokenised.texts_per_example)


def are_paraphrases(task: Task, labels: np.ndarray, threshold: float, field: str) -> np.ndarray:
    """Which pairs count as paraphrases, bool [n]: label 1 of a binary task, a similarity of at least `threshold`.

    Raises ConfigError, naming `field` (of the threshold), when the task's scores cannot be compared with it.
    """
    if task.score_range is None:
        return labels == 1
    low, high = task.score_range
    if not low <= threshold <= high:
        raise ConfigError(
            f"{field}: expected {low:g} to {high:g}, the scores of {task.name}, found {threshold:g}"
        )
    return labels >= threshold


class Paraphrases:
    """What the labels of a pair table say about its texts.

    A paraphrase of a paraphrase is a paraphrase, so the texts fall into groups. Two groups are known to differ where a
    pair that is no paraphrase joins them.

    Attributes: `groups`, int64 [n, 2], of the texts of each example; `pairs`, int64: the examples that are paraphrases.
    """

    def __init__(self, tokenised: TokenisedTable, positive: np.ndarray) -> None:
        """positive: bool [n], which examples are paraphrases."""
        identities = text_identities(tokenised)
        first, second = identities[positive].T
        count = int(identities.max(initial=-1)) + 1
        links = coo_matrix((np.ones(len(first)), (first, second)), shape=(count, count))
        self.groups = connected_components(links, directed=False)[1].astype(np.int64)[identities]
        self.pairs = np.flatnonzero(positive)

    def hard_negatives(self, negative: np.ndarray, seed: int) -> np.ndarray:
        """For each of `pairs` the number of a text that its group is known to differ from, int64; -1 where none is.

        negative: bool [n], which examples are no paraphrases. Of several such texts one is drawn, with the seed. Text
        t of example e has the number 2 e + t.
        """
        examples = np.flatnonzero(negative & (self.groups[:, 0] != self.groups[:, 1]))
        # Every negative pair (a, b) gives b to the group of a, and a to the group of b.
        owners = self.groups[examples].reshape(-1)
        texts = (2 * examples[:, None] + np.array([1, 0])).reshape(-1)
        order = np.argsort(owners, kind="stable")
        owners, texts = owners[order], texts[order]
        wanted = self.groups[self.pairs, 0]
        begin, end = np.searchsorted(owners, wanted, "left"), np.searchsorted(owners, wanted, "right")
        found = begin < end
        words = counter_generator(seed, "hard negatives").random_raw(len(begin))
        drawn = begin + (words % np.maximum(end - begin, 1).astype(np.uint64)).astype(np.int64)
        chosen = np.full(len(self.pairs), -1, dtype=np.int64)
        chosen[found] = texts[drawn[found]]
        return chosen

"""Batches of one task: reproducible, and either shuffled and nearly equal in tokens, or with equal classes."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np

from mtbert.errors import ConfigError

Sampling = Literal["shuffled", "class-balanced"]

_WINDOW = 64
_QUANTILES = 10


def counter_generator(*parts: object) -> np.random.Philox:
    """A counter-based generator whose key is a digest of `parts`.

    Use its raw words: unlike numpy's distributions, they do not change between versions.
    """
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little"))


class TaskBatches:
    """The endless sequence of batches of a task; `batch(index)` is a pure function of (seed, name, index).

    A cycle is `len(self)` batches, as many as hold every example once.

    sampling `shuffled`: a cycle holds every example exactly once, in an order of its own; its last batch may be
    smaller, all others have `batch_size` examples. A cycle is a random permutation, cut into windows of some
    dozens of batches. The examples of a window are sorted by length and dealt: of every run of neighbours, one
    goes to each batch of the window, at random. So every batch has short and long examples in equal parts, and
    nearly the same number of tokens, while each example is equally likely to meet any other.

    sampling `class-balanced`: of C classes, each has every C-th place of the sequence, so that the numbers of
    the classes in a batch differ by one at most, and every batch has `batch_size` examples. Each class walks
    through shuffled cycles of its own: the examples of a rare class come again before those of a frequent one
    have all been seen, and twice in a batch where the class is smaller than its part of the batch.

    fraction: train on a seeded part of the examples (learning curves). It depends on neither the batch size nor
    the sampling; a smaller part is a subset of a larger one; its classes (tenths of the score's range of ranks, for
    scores) are as frequent as in the whole, up to rounding, and each has at least one example.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int,
        name: str,
        *,
        sampling: Sampling = "shuffled",
        labels: np.ndarray | None = None,
        fraction: float = 1.0,
    ) -> None:
        """lengths [n]: the tokens of every example; labels [n]: classes (integers) or scores.

        Labels are needed for class-balanced sampling and for a fraction below 1. Raises ConfigError, naming the
        field, for classes of a task that has scores.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if len(lengths) == 0:
            raise ValueError(f"task {name} has no examples")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is {fraction}, expected above 0 and at most 1")
        self.batch_size = batch_size
        self.examples = np.arange(len(lengths))
        """The examples that are used, int64, ascending."""
        if labels is None:
            if sampling == "class-balanced" or fraction < 1:
                raise ValueError(f"task {name}: labels are needed")
        elif len(labels) != len(lengths):
            raise ValueError(f"task {name} has {len(lengths)} examples, but {len(labels)} labels")
        elif fraction < 1:
            self.examples = _stratified_part(labels, fraction, counter_generator(seed, name, "fraction"))
        key = (seed, name)
        self._source: _Source
        if sampling == "class-balanced":
            assert labels is not None
            if not np.issubdtype(labels.dtype, np.integer):
                raise ConfigError(
                    f"{name}.sampling: class-balanced needs a task with classes, {name} has scores; possible: shuffled"
                )
            self._source = _ClassBalanced(labels[self.examples], batch_size, key)
        else:
            self._source = _Shuffled(np.asarray(lengths)[self.examples], batch_size, key)

    def __len__(self) -> int:
        """Batches in a cycle."""
        return -(-len(self.examples) // self.batch_size)

    def batch(self, index: int) -> np.ndarray:
        """The example indices, int64, of batch `index` (from 0, counted over all cycles)."""
        if index < 0:
            raise ValueError(f"batch index is {index}, expected 0 or more")
        return self.examples[self._source.batch(index)]

    def rows(self, first: int, count: int) -> np.ndarray:
        """At most `count` examples from place `first` of the endless sequence, for batches of changing size.

        A pure function of (seed, name, first, count). Shuffled: a cycle is as many places as there are examples; at
        its end there are fewer than `count`, so that no example comes twice.
        """
        return self.examples[self._source.rows(first, count)]


class _Source(Protocol):
    """Places in the list of examples, batch by batch or one by one."""

    def batch(self, index: int) -> np.ndarray: ...

    def rows(self, first: int, count: int) -> np.ndarray: ...


class _Shuffled:
    """Cycles that hold everything once, dealt by length."""

    def __init__(self, lengths: np.ndarray, batch_size: int, key: tuple[object, ...]) -> None:
        self._lengths = lengths
        self._size = batch_size
        self._key = key
        self._batches = -(-len(lengths) // batch_size)
        self._dealt: tuple[int, np.ndarray] | None = None
        self._mixed: tuple[int, np.ndarray] | None = None

    def batch(self, index: int) -> np.ndarray:
        cycle, place = divmod(index, self._batches)
        if self._dealt is None or self._dealt[0] != cycle:
            self._dealt = cycle, self._deal(cycle)
        return self._dealt[1][place * self._size : (place + 1) * self._size]

    def rows(self, first: int, count: int) -> np.ndarray:
        cycle, place = divmod(first, len(self._lengths))
        if self._mixed is None or self._mixed[0] != cycle:
            # A dealt batch goes from short to long: a part of one must not be its short examples.
            keys = counter_generator(*self._key, cycle, "rows").random_raw(len(self._lengths))
            order = np.lexsort((keys, np.arange(len(keys)) // self._size))
            self._mixed = cycle, self._deal(cycle)[order]
        return self._mixed[1][place : place + count]

    def _deal(self, cycle: int) -> np.ndarray:
        generator = counter_generator(*self._key, cycle)
        size = self._size
        order = np.argsort(generator.random_raw(len(self._lengths)), kind="stable")
        windows = -(-self._batches // _WINDOW)
        bounds = [self._batches * w // windows * size for w in range(windows)] + [len(order)]
        for begin, end in pairwise(bounds):
            window = order[begin:end]
            window = window[np.argsort(self._lengths[window], kind="stable")]
            order[begin:end] = _deal(window, size, generator)
        return order


def _deal(examples: np.ndarray, size: int, generator: np.random.Philox) -> np.ndarray:
    """Deals examples, sorted by length, into batches of `size`; the rest is a smaller last batch."""
    rest = len(examples) % size
    small = np.zeros(0, dtype=np.int64)
    if rest:
        # One example out of each of `rest` equal runs, so that the small batch is as mixed as the others.
        bounds = np.arange(rest + 1) * len(examples) // rest
        chosen = bounds[:-1] + (generator.random_raw(rest) % np.diff(bounds).astype(np.uint64)).astype(
            np.int64
        )
        small = examples[chosen]
        examples = np.delete(examples, chosen)
    strata = examples.reshape(size, -1)  # a run of neighbours in length per line, a batch per column
    if strata.shape[1] > 1:
        keys = generator.random_raw(strata.size).reshape(strata.shape)
        strata = np.take_along_axis(strata, np.argsort(keys, axis=1, kind="stable"), axis=1)
    return np.concatenate([strata.T.reshape(-1), small])


class _ClassBalanced:
    """Place s belongs to class s mod C and holds example number s // C of that class's own shuffled cycles."""

    def __init__(self, labels: np.ndarray, batch_size: int, key: tuple[object, ...]) -> None:
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self._size = batch_size
        self._key = key
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}

    def batch(self, index: int) -> np.ndarray:
        return self.rows(index * self._size, self._size)

    def rows(self, first: int, count: int) -> np.ndarray:
        return np.array([self._example(place) for place in range(first, first + count)], dtype=np.int64)

    def _example(self, place: int) -> int:
        number, label = divmod(place, len(self._members))
        members = self._members[label]
        cycle, inside = divmod(number, len(members))
        if label not in self._shuffled or self._shuffled[label][0] != cycle:
            keys = counter_generator(*self._key, cycle, f"class {label}").random_raw(len(members))
            self._shuffled[label] = cycle, members[np.argsort(keys, kind="stable")]
        return int(self._shuffled[label][1][inside])


def _stratified_part(labels: np.ndarray, fraction: float, generator: np.random.Philox) -> np.ndarray:
    """The first part of an order that has every class (or quantile of scores) evenly all along, ascending."""
    count = len(labels)
    if np.issubdtype(labels.dtype, np.integer):
        strata = np.unique(labels, return_inverse=True)[1]
    else:
        strata = np.empty(count, dtype=np.int64)
        strata[np.argsort(labels, kind="stable")] = np.arange(count) * min(_QUANTILES, count) // count
    keys = generator.random_raw(count)
    sizes = np.bincount(strata)
    rank = np.empty(count, dtype=np.int64)
    rank[np.lexsort((keys, strata))] = np.concatenate([np.arange(size) for size in sizes])
    place = np.where(rank == 0, 0.0, (rank + 0.5) / sizes[strata])  # one of each comes before all others
    order = np.lexsort((keys, place))
    return np.sort(order[: max(len(sizes), round(fraction * count))])

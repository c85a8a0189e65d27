from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError
from mtbert.tasks.config import TaskConfig

lengths = st.lists(st.integers(2, 60), min_size=1, max_size=300).map(np.array)


def cycle(batches: TaskBatches, number: int) -> list[np.ndarray]:
    return [batches.batch(number * len(batches) + place) for place in range(len(batches))]


@given(lengths, st.integers(1, 40), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_every_example_once_a_cycle(lengths: np.ndarray, batch_size: int, seed: int, number: int) -> None:
    batches = TaskBatches(lengths, batch_size, seed, "task")
    parts = cycle(batches, number)
    assert len(parts) == len(batches) == -(-len(lengths) // batch_size)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert all(len(part) == batch_size for part in parts[:-1])
    assert 1 <= len(parts[-1]) <= batch_size
    assert all(part.dtype == np.int64 for part in parts)


@given(
    lengths, st.integers(1, 40), st.integers(0, 100), st.lists(st.integers(0, 500), min_size=1, max_size=5)
)
def test_a_batch_is_a_function_of_its_index(lengths, batch_size: int, seed: int, indices: list[int]) -> None:
    batches = TaskBatches(lengths, batch_size, seed, "task")
    for index in indices:
        fresh = TaskBatches(lengths, batch_size, seed, "task")
        np.testing.assert_array_equal(batches.batch(index), fresh.batch(index))


def test_cycles_seeds_and_names_have_orders_of_their_own() -> None:
    lengths = np.arange(200) % 50
    orders = [
        np.concatenate(cycle(TaskBatches(lengths, 16, seed, name), number)).tobytes()
        for seed, name, number in ((0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0))
    ]
    assert len(set(orders)) == 4


def test_the_order_never_changes() -> None:
    """Resuming a run, and comparing it with an older one, depend on it."""
    order = np.concatenate(cycle(TaskBatches(np.arange(500) % 37, 12, 42, "sst"), 3))
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest() == (
        "bcde4f5836e6ac8ec6bfd616b43603a05059c22549225460288b3333763f039d"
    )


def test_changing_a_batch_changes_no_later_one() -> None:
    batches = TaskBatches(np.arange(100), 10, 0, "a")
    first = batches.batch(0)
    expected = first.copy()
    first[:] = -1
    np.testing.assert_array_equal(batches.batch(0), expected)


@pytest.mark.parametrize("count", [2000, 2016, 1000 * 16 + 5])
def test_tokens_are_balanced(count: int) -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.6, count).astype(np.int64) + 3
    batches = TaskBatches(lengths, 16, 0, "a")
    parts = cycle(batches, 0)
    tokens = np.array([lengths[part].sum() for part in parts[:-1]])
    shuffled = np.random.default_rng(1).permutation(lengths)[: len(tokens) * 16].reshape(-1, 16).sum(axis=1)
    assert tokens.std() < shuffled.std() / 3
    # The smaller last batch is as mixed as the others.
    assert lengths[parts[-1]].mean() == pytest.approx(lengths.mean(), rel=0.5)


def test_company_is_random() -> None:
    """Examples of any two lengths meet, and each place of a cycle sees every example about equally often."""
    lengths = np.repeat([5, 50], 50)
    met, places = np.zeros((100, 100)), np.zeros((100, 10))
    batches = TaskBatches(lengths, 10, 0, "a")
    for number in range(400):
        for place, part in enumerate(cycle(batches, number)):
            met[np.ix_(part, part)] += 1
            places[part, place] += 1
    off_diagonal = met[~np.eye(100, dtype=bool)]
    assert off_diagonal.min() > 10
    assert places.min() > 15
    assert places.max() < 75


@pytest.mark.parametrize(("lengths", "batch_size", "index"), [([], 4, 0), ([1], 0, 0), ([1], 1, -1)])
def test_impossible_arguments(lengths: list[int], batch_size: int, index: int) -> None:
    with pytest.raises(ValueError, match=r"expected|no examples"):
        TaskBatches(np.array(lengths), batch_size, 0, "a").batch(index)


# ---- rows, for batches of changing size ----


def test_rows_walk_through_cycles_and_stop_at_their_end() -> None:
    batches = TaskBatches(np.arange(23), 5, 0, "a")
    first = [batches.rows(0, 8), batches.rows(8, 8), batches.rows(16, 8)]
    assert [len(part) for part in first] == [8, 8, 7]
    assert sorted(np.concatenate(first).tolist()) == list(range(23))
    second = batches.rows(23, 100)
    assert sorted(second.tolist()) == list(range(23))
    assert second.tolist() != np.concatenate(first).tolist()
    np.testing.assert_array_equal(
        TaskBatches(np.arange(23), 5, 0, "a").rows(10, 4), np.concatenate(first)[10:14]
    )


def test_rows_of_a_part_of_a_batch_are_not_its_short_examples() -> None:
    lengths = np.random.default_rng(0).lognormal(3, 0.6, 4000).astype(np.int64)
    batches = TaskBatches(lengths, 16, 0, "a")
    starts = np.concatenate([lengths[batches.rows(first, 4)] for first in range(0, 4000, 16)])
    assert starts.mean() == pytest.approx(lengths.mean(), rel=0.1)
    whole = np.array([lengths[batches.rows(first, 16)].sum() for first in range(0, 4000, 16)])
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 16).sum(axis=1)
    assert whole.std() < shuffled.std() / 3, "a whole batch is as balanced as ever"


# ---- class-balanced ----

LABELS = np.repeat([0, 1, 3], [40, 7, 13])  # no example has class 2


def balanced(labels: np.ndarray = LABELS, batch_size: int = 8, seed: int = 0) -> TaskBatches:
    return TaskBatches(
        np.arange(len(labels)) + 2, batch_size, seed, "sst", sampling="class-balanced", labels=labels
    )


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array),
    st.integers(1, 20),
    st.integers(0, 2**64 - 1),
)
def test_every_batch_has_as_many_of_each_class_as_possible(
    labels: np.ndarray, batch_size: int, seed: int
) -> None:
    batches = balanced(labels, batch_size, seed)
    classes = np.unique(labels)
    assert len(batches) == -(-len(labels) // batch_size)
    totals = np.zeros(5, dtype=np.int64)
    for index in range(2 * len(classes)):
        batch = batches.batch(index)
        assert batch.dtype == np.int64
        assert len(batch) == batch_size
        counts = np.bincount(labels[batch], minlength=5)
        assert set(counts[classes]) <= {batch_size // len(classes), -(-batch_size // len(classes))}
        totals += counts
    assert set(totals[classes]) == {2 * batch_size}, "over as many batches as classes, all are equal"


def test_every_class_walks_through_shuffled_cycles_of_its_own() -> None:
    batches = balanced()
    seen = np.concatenate([batches.batch(index) for index in range(60)])
    for label, size in ((0, 40), (1, 7), (3, 13)):
        own = seen[LABELS[seen] == label]
        assert len(own) == 160
        members = np.flatnonzero(label == LABELS).tolist()
        cycles = [own[start : start + size].tolist() for start in range(0, 160 - size + 1, size)]
        assert all(sorted(part) == members for part in cycles)
        assert len({tuple(part) for part in cycles}) == len(cycles), "each in an order of its own"


def test_a_balanced_batch_is_a_function_of_its_index() -> None:
    batches = balanced()
    for index in (9, 0, 30, 2, 30):
        np.testing.assert_array_equal(batches.batch(index), balanced().batch(index))
        np.testing.assert_array_equal(batches.rows(index * 8 + 3, 5), balanced().batch(index)[3:])
    assert balanced(seed=1).batch(0).tolist() != balanced(seed=0).batch(0).tolist()


def test_the_balanced_order_never_changes() -> None:
    assert balanced().batch(0).tolist() == [3, 42, 58, 5, 40, 50, 23, 46]
    assert balanced().batch(41).tolist() == [45, 59, 36, 42, 48, 3, 46, 58]


def test_scores_have_no_classes_to_balance() -> None:
    with pytest.raises(
        ConfigError, match=r"^sts\.sampling: class-balanced .* has scores; possible: shuffled"
    ):
        TaskBatches(np.arange(1, 4), 2, 0, "sts", sampling="class-balanced", labels=np.array([0.0, 2.5, 5.0]))


# ---- a fraction of the examples ----


def part(labels: np.ndarray, fraction: float, **more: object) -> np.ndarray:
    settings = {"batch_size": 8, "seed": 0, "name": "sst"} | more
    return TaskBatches(np.arange(len(labels)) + 2, labels=labels, fraction=fraction, **settings).examples  # type: ignore[arg-type]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200).map(np.array),
    st.lists(st.floats(0.001, 1.0), min_size=2, max_size=5),
    st.integers(0, 100),
)
def test_parts_are_nested_stratified_and_have_every_class(
    labels: np.ndarray, fractions: list[float], seed: int
) -> None:
    before: set[int] = set()
    counts = np.bincount(labels, minlength=5)
    for fraction in sorted(fractions):
        chosen = part(labels, fraction, seed=seed)
        assert len(chosen) == max((counts > 0).sum(), round(fraction * len(labels)))
        assert (np.diff(chosen) > 0).all()
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
        found = np.bincount(labels[chosen], minlength=5)
        assert (found[counts > 0] >= 1).all()
        # One of each class may have to come first; apart from that the shares are kept.
        assert (np.abs(found - len(chosen) * counts / len(labels)) <= 1 + 5).all()


def test_the_classes_of_a_part_are_in_proportion() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    assert np.bincount(labels[part(labels, 0.1)]).tolist() == [60, 30, 10]
    assert np.bincount(labels[part(labels, 0.5)]).tolist() == [300, 150, 50]


def test_the_scores_of_a_part_have_every_range() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(0, 5, 1000) ** 2)
    chosen = np.sort(scores[part(scores, 0.05)])
    ranks = np.searchsorted(np.sort(scores), chosen)
    assert np.bincount(ranks // 100).tolist() == [5] * 10


def test_a_part_depends_on_seed_and_name_alone() -> None:
    labels = np.arange(300) % 3
    chosen = part(labels, 0.2).tolist()
    assert part(labels, 0.2, batch_size=3).tolist() == chosen
    assert part(labels, 0.2, sampling="class-balanced").tolist() == chosen
    assert part(labels, 0.2, seed=1).tolist() != chosen
    assert part(labels, 0.2, name="para").tolist() != chosen
    assert part(labels, 1.0).tolist() == list(range(300))


@pytest.mark.parametrize("sampling", ["shuffled", "class-balanced"])
def test_batches_hold_examples_of_the_part_only(sampling: str) -> None:
    labels = np.arange(90) % 3
    batches = TaskBatches(
        np.arange(90) + 2,
        4,
        0,
        "sst",
        sampling=sampling,
        labels=labels,
        fraction=0.3,  # type: ignore[arg-type]
    )
    assert len(batches.examples) == 27
    assert len(batches) == 7
    seen = np.concatenate([batches.batch(index) for index in range(28)])
    assert set(seen.tolist()) == set(batches.examples.tolist())
    assert set(batches.rows(0, 27).tolist()) == set(batches.examples.tolist())


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_fraction_names_its_field(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"^train_fraction: .* found"):
        TaskConfig(train_fraction=fraction)
    with pytest.raises(ValueError, match="fraction"):
        TaskBatches(np.arange(1, 9), 2, 0, "a", labels=np.zeros(8, dtype=np.int64), fraction=fraction)

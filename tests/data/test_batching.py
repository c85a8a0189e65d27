from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtbert.data.batching import TaskBatches

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

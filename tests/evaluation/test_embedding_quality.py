"""Alignment and uniformity against the code that their authors publish."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mtbert.evaluation.embedding_quality import alignment, probe, uniformity
from mtbert.tasks.registry import get_task


def authors_alignment(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm(dim=1).pow(2).mean())


def authors_uniformity(x: torch.Tensor) -> float:
    return float(torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log())


@pytest.mark.parametrize("n", [2, 50, 1500])
def test_are_the_published_formulas(n: int) -> None:
    x, y = torch.randn(2, n, 6, dtype=torch.float64)
    unit = [F.normalize(rows, dim=1) for rows in (x, y)]
    assert alignment(x.numpy(), y.numpy()) == pytest.approx(authors_alignment(*unit), rel=1e-10)
    assert uniformity(x.numpy()) == pytest.approx(authors_uniformity(unit[0]), rel=1e-8)


def test_by_hand() -> None:
    rows = np.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=np.float32)
    assert alignment(rows[:2], rows[1:]) == pytest.approx(2.0)
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(rows) == pytest.approx(expected, rel=1e-12)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(np.ones((1, 3))) == 0.0
    assert uniformity(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])) == pytest.approx(
        math.log((1 + 2 * math.exp(-2)) / 3)
    )


def test_positives_of_each_kind_of_task() -> None:
    examples = np.array([4, 0, 2])
    similar = probe(get_task("sts"), np.array([4.0, 0.0, 3.9, 5.0, 5.0]), examples)
    assert similar.texts.tolist() == [8, 9, 0, 1, 4, 5]
    assert similar.pairs.tolist() == [[0, 1], [2, 3]]
    paraphrases = probe(get_task("para"), np.array([0, 0, 1, 1, 1]), examples)
    assert paraphrases.texts[paraphrases.pairs].tolist() == [[8, 9], [4, 5]]
    sentences = probe(get_task("sst"), np.array([4, 4, 4, 4, 4]), examples)
    assert sentences.texts.tolist() == [4, 0, 2]
    assert len(sentences.pairs) == 0


def test_measure() -> None:
    chosen = probe(get_task("para"), np.array([1, 0, 1]), np.arange(3))
    rows = np.random.default_rng(0).normal(size=(6, 4))
    found = chosen.measure(rows)
    assert found.alignment == alignment(rows[[0, 4]], rows[[1, 5]])
    assert found.uniformity == uniformity(rows)
    assert (found.pairs, found.sentences) == (2, 6)
    assert found.to_json()["alignment"] == found.alignment
    assert probe(get_task("sst"), np.zeros(3), np.arange(3)).measure(rows[:3]).alignment is None
    with pytest.raises(ValueError, match="expected 6 embeddings, found 5"):
        chosen.measure(rows[:5])

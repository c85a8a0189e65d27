"""The triplet loss against torch's, and where its negatives come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.comparing import bag, context, step_losses, token_vectors, tokenised
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.triplet import TripletConfig, build_triplet, in_batch_negatives, triplet_losses

A, B, C, D, E, G, H = [10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20], [21]
PARA = tokenised("para", [(A, B), (A, C), (D, E), (G, H), (H, G)], [1, 0, 1, 1, 1])


@pytest.mark.parametrize("margin", [0.5, 1.0, 3.0])
def test_is_torchs_loss(margin: float) -> None:
    a, p, n = 3 * torch.randn(3, 100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.TripletMarginLoss(margin, p=2, eps=0, reduction="none")(a, p, n)
    assert (expected == 0).any()
    torch.testing.assert_close(triplet_losses(a, p, n, margin), expected, rtol=1e-10, atol=1e-12)


def test_by_hand() -> None:
    a, p, n = torch.tensor([[[0.0, 0.0]] * 2, [[3.0, 4.0]] * 2, [[0.0, 5.5], [0.0, 7.0]]])
    assert triplet_losses(a, p, n, 1.0).tolist() == [0.5, 0.0]


def test_gradients() -> None:
    a, p, n = (x.requires_grad_() for x in torch.randn(3, 6, 4, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *x: triplet_losses(*x, margin=5.0), (a, p, n))
    same = torch.ones(2, 4, requires_grad=True)
    triplet_losses(same, same * 1, same * 1).sum().backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_in_batch_negatives_are_the_next_of_another_group() -> None:
    assert in_batch_negatives(np.array([4, 4, 7, 9, 4])).tolist() == [2, 2, 3, 4, 2]
    assert in_batch_negatives(np.array([4, 4])).tolist() == [-1, -1]
    assert in_batch_negatives(np.array([4])).tolist() == [-1]
    assert in_batch_negatives(np.array([], dtype=np.int64)).tolist() == []


def expected_loss(vectors: Tensor, *triplets: tuple[list[int], list[int], list[int]]) -> list[Tensor]:
    loss = torch.nn.TripletMarginLoss(margin=1.0, eps=0)
    return [loss(*(bag(text, vectors)[None] for text in triplet)) for triplet in triplets]


def test_known_differences_else_the_next_duplicate_of_the_batch() -> None:
    run, vectors = context({"para": PARA}), token_vectors()
    triplet = build_triplet(TripletConfig(["para"], weight=0.5), run)
    assert triplet is not None
    assert triplet.poolings() == {"para/triplet": "mean"}
    found = step_losses(triplet, run, {"para": [3, 2, 1, 4, 0]}, vectors)
    # (G, H) and (H, G) are of one group; C is known to differ from A; example 1 is no paraphrase.
    losses = expected_loss(vectors, (G, H, E), (D, E, G), (H, G, B), (A, B, C))
    torch.testing.assert_close(found["para"], 0.5 * torch.stack(losses).sum() / 4)
    # Alone, a pair without a known difference costs nothing, and still counts in the mean.
    (known,) = expected_loss(vectors, (A, B, C))
    torch.testing.assert_close(step_losses(triplet, run, {"para": [0]}, vectors)["para"], 0.5 * known)
    both = step_losses(triplet, run, {"para": [0, 3]}, vectors, max_tokens=13)
    torch.testing.assert_close(both["para"], 0.25 * known)
    assert step_losses(triplet, run, {"para": [3, 4]}, vectors)["para"].item() == 0
    assert step_losses(triplet, run, {"para": [1]}, vectors) == {}


def test_nothing_known_to_differ() -> None:
    table = tokenised("para", [(A, B), (C, D), (E, G)], [1, 1, 0])
    run, vectors = context({"para": table}), token_vectors()
    triplet = build_triplet(TripletConfig(["para"]), run)
    assert triplet is not None
    assert triplet.streams()["para/triplet"].rows_per_example == 2
    found = step_losses(triplet, run, {"para": [0, 1, 2]}, vectors)
    losses = expected_loss(vectors, (A, B, D), (C, D, B))
    torch.testing.assert_close(found["para"], torch.stack(losses).mean())
    with pytest.raises(ConfigError, match=r"para\.batch_size: no text .* expected at least 2, found 1"):
        build_triplet(TripletConfig(["para"]), context({"para": table}, batch_size=1))


STS = tokenised("sts", [(A, B), (C, D)], [5.0, 5.0])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"margin": 0.0}, {}, r"triplet\.margin: expected a number above 0, found 0"),
        ({"weight": -2.0}, {}, r"triplet\.weight: expected a number above 0, found -2"),
        ({"tasks": ["sts"]}, {}, r"triplet\.tasks: 'sts' is not possible .*; possible: para"),
        ({"tasks": ["sst"]}, {}, r"triplet\.tasks: 'sst' is not possible .*; possible: para"),
        ({}, {"mode": "last-linear-layer"}, r"triplet\.tasks: needs a trained encoder"),
    ],
)
def test_impossible_settings(changes: dict, settings: dict, message: str) -> None:
    run = context({"para": PARA, "sts": STS}, **settings)
    with pytest.raises(ConfigError, match=message):
        build_triplet(TripletConfig(**{"tasks": ["para"], **changes}), run)


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        ([(A, B), (C, D)], [0, 0], "expected at least 1 paraphrases, found 0 of 2 training pairs of para"),
        ([(A, B), (B, C)], [1, 1], "no training pair of para has a text that differs"),
    ],
)
def test_no_triplets(examples: list, labels: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"triplet\.tasks: {message}"):
        build_triplet(TripletConfig(["para"]), context({"para": tokenised("para", examples, labels)}))


def test_one_known_triplet_is_enough_for_batches_of_one() -> None:
    table = tokenised("para", [(A, B), (B, C)], [1, 0])
    run = context({"para": table}, batch_size=1)
    assert build_triplet(TripletConfig(["para"]), run) is not None
    assert build_triplet(TripletConfig(), run) is None

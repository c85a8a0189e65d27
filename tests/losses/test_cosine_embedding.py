"""CosineEmbeddingLoss against torch's, its labels and its margin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.comparing import bag, context, step_losses, token_vectors, tokenised

from mtbert.errors import ConfigError
from mtbert.losses.cosine_embedding import (
    CosineEmbeddingConfig,
    build_cosine_embedding,
    cosine_embedding_losses,
    pair_targets,
)
from mtbert.model.heads import HeadConfig
from mtbert.tasks.registry import get_task

TEXTS = [([10, 11], [12]), ([13], [14, 15]), ([16], [17]), ([18, 19], [20]), ([21], [22]), ([23], [24])]
STS = tokenised("sts", TEXTS, [0.0, 5.0, 2.0, 3.0, 0.0, 2.5])
PARA = tokenised("para", TEXTS, [0, 1, 1, 0, 0, 1])
SST = tokenised("sst", [([10],), ([11],)], [0, 1])
SHARED_HEAD = HeadConfig(pair=["cosine"], pooling="mean")


@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.3, 1.0])
def test_is_torchs_loss(margin: float) -> None:
    a, b = torch.randn(2, 50, 4, dtype=torch.float64)
    targets = torch.tensor([1, -1] * 25)
    expected = torch.nn.CosineEmbeddingLoss(margin, reduction="none")(a, b, targets)
    torch.testing.assert_close(cosine_embedding_losses(a, b, targets, margin), expected, rtol=1e-8, atol=1e-9)


def test_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[0.0, 3.0], [2.0, 0.0], [-1.0, 0.0]])
    assert cosine_embedding_losses(a, b, torch.tensor([1, 1, 1]), 0.5).tolist() == [1.0, 0.0, 2.0]
    assert cosine_embedding_losses(a, b, torch.tensor([-1, -1, -1]), 0.25).tolist() == [0.0, 0.75, 0.0]


def test_gradients() -> None:
    a, b = torch.randn(2, 6, 3, dtype=torch.float64)
    targets = torch.tensor([1, -1, 1, -1, -1, 1])
    assert torch.autograd.gradcheck(
        lambda x, y: cosine_embedding_losses(x, y, targets, -0.9), (a.requires_grad_(), b.requires_grad_())
    )
    zero = torch.zeros(6, 3, requires_grad=True)
    cosine_embedding_losses(zero, b.detach(), targets, -0.5).sum().backward()
    assert zero.grad is not None
    assert zero.grad.abs().max() == 0


def test_margin_follows_training() -> None:
    config = CosineEmbeddingConfig(margin=0.1, final_margin=0.5)
    assert [config.margin_at(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0.1, 0.2, 0.5])
    assert [CosineEmbeddingConfig(margin=0.4).margin_at(p) for p in (0.0, 1.0)] == [0.4, 0.4]


def test_labels() -> None:
    sts, labels = get_task("sts"), np.array([0.0, 0.2, 2.0, 2.4, 2.5, 3.0, 4.9, 5.0])
    config = CosineEmbeddingConfig()
    assert pair_targets(sts, labels, config).tolist() == [-1, -1, -1, -1, 1, 1, 1, 1]
    config = CosineEmbeddingConfig(labels="extremes")
    assert pair_targets(sts, labels, config).tolist() == [-1, 0, 0, 0, 0, 0, 0, 1]
    assert pair_targets(get_task("para"), np.array([0, 1, 1]), config).tolist() == [-1, 1, 1]


@pytest.mark.parametrize("head", [HeadConfig(), SHARED_HEAD], ids=["own rows", "the task's rows"])
@pytest.mark.parametrize(
    ("labels", "expected"), [("threshold", [-1, 1, -1, 1, -1, 1]), ("extremes", [-1, 1, 0, 0, -1, 0])]
)
@pytest.mark.parametrize("max_tokens", [12, 4096])
def test_the_mean_is_over_the_used_pairs_of_the_step(
    head: HeadConfig, labels: str, expected: list[int], max_tokens: int
) -> None:
    """However many passes the step takes."""
    run, vectors = context({"sts": STS}, head=head, batch_size=1), token_vectors()
    config = CosineEmbeddingConfig(["sts"], weight=2.0, margin=-0.5, final_margin=0.5, labels=labels)  # type: ignore[arg-type]
    objective = build_cosine_embedding(config, run)
    assert objective is not None
    assert list(objective.streams()) == ([] if head is SHARED_HEAD else ["sts/cosine_embedding"])
    order = [5, 2, 0, 1, 4]
    found = step_losses(objective, run, {"sts": order}, vectors, progress=0.75, max_tokens=max_tokens)
    used = [i for i in order if expected[i]]
    a, b = (torch.stack([bag(TEXTS[i][side], vectors) for i in used]) for side in (0, 1))
    targets = torch.tensor([expected[i] for i in used])
    wanted = 2.0 * torch.nn.CosineEmbeddingLoss(0.25)(a, b, targets)
    torch.testing.assert_close(found["sts"], wanted)
    (gradient,) = torch.autograd.grad(found["sts"], vectors)
    (wanted_gradient,) = torch.autograd.grad(wanted, vectors)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_binary_tasks_by_their_label() -> None:
    run, vectors = context({"para": PARA, "sts": STS}), token_vectors()
    objective = build_cosine_embedding(CosineEmbeddingConfig(["para"]), run)
    assert objective is not None
    found = step_losses(objective, run, {"para": [0, 1], "sts": [0, 1]}, vectors)
    a, b = (torch.stack([bag(TEXTS[i][side], vectors) for i in (0, 1)]) for side in (0, 1))
    expected = torch.nn.CosineEmbeddingLoss()(a, b, torch.tensor([-1, 1]))
    assert found.keys() == {"para"}
    torch.testing.assert_close(found["para"], expected)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"margin": 1.5}, {}, r"cosine_embedding\.margin: expected a cosine from -1 to 1, found 1\.5"),
        (
            {"final_margin": float("nan")},
            {},
            r"cosine_embedding\.final_margin: expected a cosine .* found nan",
        ),
        ({"weight": 0.0}, {}, r"cosine_embedding\.weight: expected a number above 0, found 0"),
        ({"threshold": 7.0}, {}, r"cosine_embedding\.threshold: expected 0 to 5, .* found 7"),
        ({"tasks": ["sst"]}, {}, r"cosine_embedding\.tasks: 'sst' is not possible .*; possible: para, sts"),
        ({}, {"mode": "last-linear-layer"}, r"cosine_embedding\.tasks: needs a trained encoder"),
    ],
)
def test_impossible_settings(changes: dict, settings: dict, message: str) -> None:
    run = context({"sst": SST, "para": PARA, "sts": STS}, **settings)
    with pytest.raises(ConfigError, match=message):
        build_cosine_embedding(CosineEmbeddingConfig(**{"tasks": ["sts"], **changes}), run)


@pytest.mark.parametrize(
    ("task", "labels", "changes", "message"),
    [
        (
            "sts",
            [1.0, 2.0, 5.0],
            {"threshold": 0.0},
            r"threshold: with 0 all 3 .* alike; possible: above 1, up to 5",
        ),
        (
            "sts",
            [1.0, 2.0],
            {"threshold": 3.0},
            r"threshold: with 3 all 2 .* unlike; possible: above 1, up to 2",
        ),
        (
            "sts",
            [0.0, 0.0, 4.0],
            {"labels": "extremes"},
            r"labels: with extremes all 2 .* unlike; possible: thr",
        ),
        (
            "sts",
            [3.0, 3.0],
            {},
            r"tasks: all 2 training pairs of sts that count are alike; possible: tasks whose",
        ),
        ("para", [1, 1], {}, r"tasks: all 2 training pairs of para that count are alike"),
    ],
)
def test_pairs_of_one_kind_are_refused(task: str, labels: list, changes: dict, message: str) -> None:
    run = context({task: tokenised(task, TEXTS[: len(labels)], labels)})
    with pytest.raises(ConfigError, match=rf"^cosine_embedding\.{message}"):
        build_cosine_embedding(CosineEmbeddingConfig([task], **changes), run)


def test_no_extremes() -> None:
    run = context({"sts": tokenised("sts", TEXTS[:2], [1.0, 4.0])})
    config = CosineEmbeddingConfig(["sts"], labels="extremes")
    message = (
        r"cosine_embedding\.labels: extremes, but no training pair of sts has the score 0 or 5; possible: thr"
    )
    with pytest.raises(ConfigError, match=message):
        build_cosine_embedding(config, run)
    assert build_cosine_embedding(CosineEmbeddingConfig(), run) is None

"""The multiple negatives ranking loss against sentence-transformers' formula and explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.comparing import bag, context, step_losses, token_vectors, tokenised
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.mnrl import MnrlConfig, build_mnrl, mnrl_losses
from mtbert.model.heads import HeadConfig

A, B, C, D, E, G = [10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20]
PARA = tokenised("para", [(A, B), (C, D), (A, E), (G, E), (D, G)], [1, 1, 0, 1, 0])


def sentence_transformers(a: Tensor, b: Tensor, scale: float, symmetric: bool) -> Tensor:
    """The loss as that library has it: cross-entropy over scaled cosines with the diagonal as labels."""
    scores = F.normalize(a, p=2, dim=1) @ F.normalize(b, p=2, dim=1).transpose(0, 1) * scale
    labels = torch.arange(len(scores))
    forward = F.cross_entropy(scores, labels)
    return (forward + F.cross_entropy(scores.transpose(0, 1), labels)) / 2 if symmetric else forward


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("n", [2, 7])
def test_is_the_published_formula(n: int, symmetric: bool) -> None:
    a, b = torch.randn(2, n, 6, dtype=torch.float64)
    found = mnrl_losses(a, b, torch.arange(n), 20.0, symmetric)
    torch.testing.assert_close(found.mean(), sentence_transformers(a, b, 20.0, symmetric), rtol=1e-10, atol=0)


def test_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    b = torch.tensor([[3.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    expected = [-1 + math.log(math.e + math.exp(half)), -half + math.log(1 + math.exp(half))]
    found = mnrl_losses(a, b, torch.arange(2), scale=1.0)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_gradients() -> None:
    a, b = torch.randn(2, 4, 3, dtype=torch.float64)
    groups = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x, y: mnrl_losses(x, y, groups, 20.0, symmetric=True), (a.requires_grad_(), b.requires_grad_())
    )


def test_pairs_of_a_group_are_no_negatives() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64)
    together = mnrl_losses(a, b, torch.tensor([5, 8, 5]))
    first, second = ([0, 1], [1, 2])
    expected = [
        mnrl_losses(a[first], b[first], torch.arange(2))[0],
        mnrl_losses(a, b, torch.arange(3))[1],
        mnrl_losses(a[second], b[second], torch.arange(2))[1],
    ]
    torch.testing.assert_close(together, torch.stack(expected))


def test_one_pair_and_zero_vectors() -> None:
    one = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    losses = mnrl_losses(one, one * 2, torch.zeros(1, dtype=torch.int64), symmetric=True)
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert one.grad is not None
    assert one.grad.abs().max() == 0
    zero = torch.zeros(3, 4, requires_grad=True)
    mnrl_losses(zero, torch.randn(3, 4), torch.arange(3)).sum().backward()
    assert zero.grad is not None
    assert zero.grad.tolist() == torch.zeros(3, 4).tolist()


def test_half_precision_is_computed_in_float32() -> None:
    a, b = torch.randn(2, 6, 32).bfloat16()
    found = mnrl_losses(a, b, torch.arange(6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mnrl_losses(a.float(), b.float(), torch.arange(6)))


@pytest.mark.parametrize(
    "head", [HeadConfig(), HeadConfig(pair=["cosine"], pooling="mean"), HeadConfig(pair=["dot"])]
)
def test_only_paraphrases_enter(head: HeadConfig) -> None:
    """Whether the pairs are packed for it, or the task's own rows serve (the middle head)."""
    run, vectors = context({"para": PARA}, head=head), token_vectors()
    mnrl = build_mnrl(MnrlConfig(["para"], weight=0.5), run)
    assert mnrl is not None
    assert list(mnrl.streams()) == ([] if head.pooling == "mean" else ["para/mnrl"])
    assert list(mnrl.poolings().values()) == ["mean"] * len(mnrl.streams())
    found = step_losses(mnrl, run, {"para": [4, 3, 2, 0, 1]}, vectors)
    a, b = (torch.stack([bag(text, vectors) for text in texts]) for texts in ((G, A, C), (E, B, D)))
    torch.testing.assert_close(found["para"], 0.5 * sentence_transformers(a, b, 20.0, False))
    assert step_losses(mnrl, run, {"para": [2, 4]}, vectors) == {}
    assert step_losses(mnrl, run, {"para": [2, 3]}, vectors)["para"].item() == 0


def test_the_same_text_in_two_pairs_is_no_negative() -> None:
    table = tokenised("para", [(A, B), (B, C), (D, E), (C, G)], [1, 1, 1, 0])
    run, vectors = context({"para": table}), token_vectors()
    mnrl = build_mnrl(MnrlConfig(["para"]), run)
    assert mnrl is not None
    rows = {name: bag(text, vectors) for name, text in zip("ABCDE", (A, B, C, D, E), strict=True)}

    def loss(anchor: str, positive: str, *negatives: str) -> Tensor:
        scores = [
            20 * F.cosine_similarity(rows[anchor], rows[other], dim=0) for other in (positive, *negatives)
        ]
        return torch.logsumexp(torch.stack(scores), 0) - scores[0]

    expected = (loss("A", "B", "E") + loss("B", "C", "E") + loss("D", "E", "B", "C")) / 3
    torch.testing.assert_close(step_losses(mnrl, run, {"para": [0, 1, 2, 3]}, vectors)["para"], expected)


def test_similarities_above_the_threshold() -> None:
    table = tokenised("sts", [(A, B), (C, D), (E, G)], [4.0, 3.9, 5.0])
    run, vectors = context({"sts": table}), token_vectors()
    mnrl = build_mnrl(MnrlConfig(["sts"], symmetric=True), run)
    assert mnrl is not None
    a, b = (torch.stack([bag(text, vectors) for text in texts]) for texts in ((A, E), (B, G)))
    found = step_losses(mnrl, run, {"sts": [0, 1, 2]}, vectors)
    torch.testing.assert_close(found["sts"], sentence_transformers(a, b, 20.0, True))


def test_a_split_step_takes_its_negatives_from_each_pass() -> None:
    table = tokenised("para", [(A, B), (C, D), (E, G), ([21], [22])], [1, 1, 1, 1])
    run, vectors = context({"para": table}, head=HeadConfig(pair=["cosine"], pooling="mean")), token_vectors()
    mnrl = build_mnrl(MnrlConfig(["para"]), run)
    assert mnrl is not None
    found = step_losses(mnrl, run, {"para": [0, 1, 2, 3]}, vectors, max_tokens=17)
    a, b = (torch.stack([bag(t, vectors) for t in texts]) for texts in ((A, C, E, [21]), (B, D, G, [22])))
    halves = [sentence_transformers(a[part], b[part], 20.0, False) for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(found["para"], (halves[0] + halves[1]) / 2)


SST = tokenised("sst", [(A,), (B,)], [0, 4])
STS = tokenised("sts", [(A, B), (C, D), (E, G)], [1.0, 4.5, 2.0])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"scale": 0.0}, {}, "mnrl.scale: expected a number above 0 and at most 1000, found 0"),
        ({"scale": 1e30}, {}, r"mnrl\.scale: .* at most 1000, found 1e\+30"),
        ({"weight": -1.0}, {}, "mnrl.weight: expected a number above 0, found -1"),
        ({"tasks": ["sst"]}, {}, r"mnrl\.tasks: 'sst' is not possible .*; possible: para, sts"),
        ({"tasks": ["cola"]}, {}, r"mnrl\.tasks: 'cola' is not possible .*; possible: para, sts"),
        ({"tasks": ["para", "para"]}, {}, r"mnrl\.tasks: a task is named twice"),
        ({}, {"mode": "last-linear-layer"}, r"mnrl\.tasks: needs a trained encoder, mode last-linear-layer"),
        ({}, {"batch_size": 1}, r"para\.batch_size: mnrl .* expected at least 2, found 1"),
        (
            {"tasks": ["sts"]},
            {},
            r"mnrl\.threshold: .* 4 or more, found 1 of 3 .* highest similarity is 4\.5",
        ),
        ({"tasks": ["sts"], "threshold": 6.0}, {}, r"mnrl\.threshold: expected 0 to 5, .* found 6"),
    ],
)
def test_impossible_settings(changes: dict, settings: dict, message: str) -> None:
    run = context({"sst": SST, "para": PARA, "sts": STS}, **settings)
    with pytest.raises(ConfigError, match=message):
        build_mnrl(MnrlConfig(**{"tasks": ["para"], **changes}), run)


def test_a_table_without_paraphrases() -> None:
    run = context({"para": tokenised("para", [(A, B), (C, D), (E, G)], [0, 1, 0])})
    with pytest.raises(ConfigError, match=r"mnrl\.tasks: expected at least 2 paraphrases, found 1 of 3"):
        build_mnrl(MnrlConfig(["para"]), run)


def test_no_tasks_is_no_objective() -> None:
    assert build_mnrl(MnrlConfig(), context({"sst": SST}, mode="last-linear-layer")) is None

"""SimCSE against the paper's equations written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.comparing import WIDTH, BagPass, bag, context, passes, step_losses, token_vectors, tokenised
from torch import Tensor

from mtbert.data.batching import TaskBatches
from mtbert.errors import ConfigError
from mtbert.losses.paraphrases import Paraphrases, text_identities
from mtbert.losses.simcse import SimCseConfig, build_simcse, supervised_losses, unsupervised_losses

A, B, C, D, E, G, H = [10, 11], [12], [13, 14, 15], [16, 17], [18], [19, 20], [21]
SST = tokenised("sst", [(A,), (B,), (C,), (B,), (D,)], [0, 1, 2, 3, 4])
PARA = tokenised("para", [(A, B), (A, C), (D, E), (G, H), (G, H)], [1, 0, 1, 1, 1])
STS = tokenised("sts", [(A, B), (C, D), (E, A)], [5.0, 4.0, 0.0])


def equation_5(h: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """-log of e^(sim(h_i, h_i+) / t) over the sum of those of all positives and all hard negatives; [n]."""

    def weight(u: Tensor, v: Tensor) -> Tensor:
        return torch.exp(torch.dot(u, v) / (u.norm() * v.norm()) / temperature)

    losses = []
    for i in range(len(h)):
        below = sum(weight(h[i], v) for v in [*positive, *negative])
        losses.append(-torch.log(weight(h[i], positive[i]) / below))
    return torch.stack(losses)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equation_1(temperature: float) -> None:
    views = torch.randn(6, 2, 8, dtype=torch.float64)
    expected = equation_5(views[:, 0], views[:, 1], views[:0, 1], temperature)
    torch.testing.assert_close(unsupervised_losses(views, temperature), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("negatives", [0, 2, 5])
def test_equation_5(negatives: int) -> None:
    h, positive, negative = torch.randn(3, 5, 8, dtype=torch.float64)
    groups, others = torch.arange(5), 5 + torch.arange(negatives)
    found = supervised_losses(h, positive, negative[:negatives], groups, others)
    torch.testing.assert_close(
        found, equation_5(h, positive, negative[:negatives], 0.05), rtol=1e-10, atol=1e-12
    )


def test_by_hand() -> None:
    one, other = [1.0, 0.0], [0.0, 1.0]
    views = torch.tensor([[one, one], [other, one]], dtype=torch.float64)
    expected = torch.tensor([math.log(2), math.log(2)], dtype=torch.float64)
    torch.testing.assert_close(unsupervised_losses(views), expected)
    apart = torch.tensor([[one, one], [other, other]], dtype=torch.float64)
    expected = torch.full((2,), math.log(1 + math.exp(-20)), dtype=torch.float64)
    torch.testing.assert_close(unsupervised_losses(apart), expected, rtol=1e-7, atol=0)


def test_a_negative_that_is_a_paraphrase_of_the_anchor_is_left_out() -> None:
    h, positive, negative = torch.randn(3, 2, 4, dtype=torch.float64)
    groups, others = torch.tensor([3, 4]), torch.tensor([4, 9])
    found = supervised_losses(h, positive, negative, groups, others, temperature=1.0)
    torch.testing.assert_close(found[0], equation_5(h, positive, negative, 1.0)[0])
    torch.testing.assert_close(found[1], equation_5(h, positive, negative[1:], 1.0)[1])


def test_gradients() -> None:
    views = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unsupervised_losses, (views,))
    h, positive, negative = (x.requires_grad_() for x in torch.randn(3, 3, 4, dtype=torch.float64))
    groups, others = torch.arange(3), torch.tensor([1, 7, 8])
    assert torch.autograd.gradcheck(
        lambda *x: supervised_losses(*x, groups, others, 0.1), (h, positive, negative)
    )


def test_one_sentence_and_zero_vectors() -> None:
    views = torch.randn(1, 2, 4, requires_grad=True)
    losses = unsupervised_losses(views)
    losses.sum().backward()
    assert losses.tolist() == [0.0]
    assert views.grad is not None
    assert views.grad.abs().max() == 0
    zeros = torch.zeros(3, 2, 4, requires_grad=True)
    unsupervised_losses(zeros).sum().backward()
    assert zeros.grad is not None
    assert torch.isfinite(zeros.grad).all()


# ---- the objective ----


def deviations() -> Tensor:
    """What makes the rows of a step different, as dropout does."""
    return 0.1 * torch.randn(64, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def test_every_sentence_is_packed_twice() -> None:
    run, vectors = context({"sst": SST, "para": PARA}), token_vectors()
    simcse = build_simcse(SimCseConfig(["sst", "para"], weight=0.3), run)
    assert simcse is not None
    assert simcse.poolings() == {"sst/simcse": "cls", "para/simcse": "cls"}
    plan = {"sst": np.array([0, 1, 3, 4]), "para": np.array([1, 0])}
    (found,) = passes(simcse, run, plan, vectors, deviations=deviations())
    assert [(s.stream, s.task) for s in found.segments] == [
        ("sst", "sst"),
        ("sst/simcse", "sst"),
        ("para", "para"),
        ("para/simcse", "para"),
    ]
    losses = simcse.losses(found)
    # Row ids of the step: 4 of sst, then its 3 different sentences twice; 2 cross rows of para, then A, B, C twice.
    for task, first, sentences in (("sst", 4, (A, B, D)), ("para", 12, (A, B, C))):
        rows = torch.stack([bag(text, vectors) for text in sentences for _ in range(2)])
        views = (rows + deviations()[first : first + 6]).unflatten(0, (3, 2))
        expected = 0.3 * equation_5(views[:, 0], views[:, 1], views[:0, 1], 0.05).mean()
        torch.testing.assert_close(losses[task], expected)


def test_only_tasks_of_the_step() -> None:
    run, vectors = context({"sst": SST, "para": PARA}), token_vectors()
    simcse = build_simcse(SimCseConfig(["sst"]), run)
    assert simcse is not None
    assert step_losses(simcse, run, {"para": [0, 1]}, vectors) == {}
    assert step_losses(simcse, run, {"sst": [], "para": [0]}, vectors) == {}
    assert step_losses(simcse, run, {"sst": [0, 1]}, vectors).keys() == {"sst"}


def test_passes_weigh_by_the_sentences_of_the_step() -> None:
    run, vectors = context({"sst": SST}), token_vectors()
    simcse = build_simcse(SimCseConfig(["sst"]), run)
    assert simcse is not None
    plan = {"sst": np.array([0, 1, 2, 4])}
    parts = list(passes(simcse, run, plan, vectors, deviations=deviations(), max_tokens=20))
    assert len(parts) > 1
    expected = torch.zeros(())
    for part in parts:
        if "sst/simcse" in part.rows:
            views = part.rows["sst/simcse"].unflatten(0, (-1, 2))
            expected = expected + equation_5(views[:, 0], views[:, 1], views[:0, 1], 0.05).sum() / 4
    found = step_losses(simcse, run, {"sst": [0, 1, 2, 4]}, vectors, deviations=deviations(), max_tokens=20)
    torch.testing.assert_close(found["sst"], expected, check_dtype=False)


def test_batches_of_its_own() -> None:
    run = context({"sst": SST}, batch_size=1)
    simcse = build_simcse(SimCseConfig(["sst"], batch_size=2), run)
    assert simcse is not None
    taken = [simcse.examples({"sst": np.array([0])}, step)["sst/simcse"].tolist() for step in range(2)]
    assert sorted(taken[0] + taken[1]) == [0, 1, 2, 3]  # the four different sentences
    again = build_simcse(SimCseConfig(["sst"], batch_size=2), run)
    assert again is not None
    assert again.examples({"sst": np.array([3])}, 1)["sst/simcse"].tolist() == taken[1]
    assert simcse.examples({"para": np.array([0])}, 0) == {}
    assert simcse.examples({"sst": np.array([], dtype=np.int64)}, 0) == {}


def supervised_pass(plan: list[int], **settings: object) -> tuple[BagPass, Tensor]:
    run, vectors = context({"para": PARA}), token_vectors()
    simcse = build_simcse(SimCseConfig(["para"], supervised=True, **settings), run)  # type: ignore[arg-type]
    assert simcse is not None
    (found,) = passes(simcse, run, {"para": np.array(plan)}, vectors)
    return found, simcse.losses(found)["para"]


def test_supervised_takes_paraphrases_and_known_differences() -> None:
    """C differs from A, so it is the hard negative of (A, B); (D, E) has none; the two (G, H) are one group."""
    found, loss = supervised_pass([0, 1, 2, 3, 4], temperature=0.5)
    vectors = token_vectors()
    rows = [bag(text, vectors) for text in (A, B, C, D, E, G, H, [])]
    a, b, c, d, e, g, h, empty = rows
    expected_rows = torch.stack([a, b, c, d, e, empty, g, h, empty, g, h, empty])
    torch.testing.assert_close(found.rows["para/simcse"], expected_rows)

    def one(anchor: Tensor, positive: Tensor, *others: Tensor) -> Tensor:
        scores = torch.stack(
            [F.cosine_similarity(anchor, other, dim=0) / 0.5 for other in (positive, *others)]
        )
        return torch.logsumexp(scores, 0) - scores[0]

    expected = (one(a, b, c, e, h, h) + one(d, e, b, c, h, h) + 2 * one(g, h, b, c, e)) / 4
    torch.testing.assert_close(loss, expected)


def test_supervised_without_hard_negatives() -> None:
    run, vectors = context({"sts": STS}), token_vectors()
    simcse = build_simcse(SimCseConfig(["sts"], supervised=True), run)
    assert simcse is not None
    assert simcse.streams()["sts/simcse"].rows_per_example == 2
    found = step_losses(simcse, run, {"sts": [0, 1, 2]}, vectors)
    h, positive = (torch.stack([bag(t, vectors) for t in texts]) for texts in ((A, C), (B, D)))
    torch.testing.assert_close(found["sts"], equation_5(h, positive, h[:0], 0.05).mean())


def test_supervised_batches_of_its_own() -> None:
    run = context({"para": PARA}, batch_size=1)
    simcse = build_simcse(SimCseConfig(["para"], supervised=True, batch_size=3), run)
    assert simcse is not None
    taken = [simcse.examples({"para": np.array([1])}, step)["para/simcse"].tolist() for step in range(2)]
    assert sorted(taken[0] + taken[1]) == [0, 1, 2, 3]  # the four paraphrases


# ---- what is the same, and what is known to differ ----


def test_identities_are_those_of_the_tokens() -> None:
    table = tokenised("para", [(A, B), (B, []), (C, A)], [1, 1, 1])
    assert text_identities(table).tolist() == [[0, 1], [1, 2], [3, 0]]


def test_paraphrases_of_paraphrases_are_a_group() -> None:
    table = tokenised("para", [(A, B), (B, C), (D, E), (C, D), (E, E), (A, C), (G, H)], [1, 1, 1, 0, 1, 0, 0])
    positive = table.table.labels == 1
    known = Paraphrases(table, positive)
    groups = known.groups
    assert groups[0, 0] == groups[0, 1] == groups[1, 0] == groups[1, 1] == groups[5, 0] == groups[5, 1]
    assert groups[2, 0] == groups[2, 1] == groups[4, 0] != groups[0, 0]
    assert len({groups[0, 0], groups[2, 0], *groups[6]}) == 4
    assert known.pairs.tolist() == [0, 1, 2, 4]
    # Example 3 is texts 6 (C) and 7 (D): the group of A, B, C has D as its negative, the group of D, E has C. That
    # (A, C) is labelled 0 contradicts (A, B) and (B, C), and is left out.
    assert known.hard_negatives(~positive, seed=0).tolist() == [7, 7, 6, 6]


def test_hard_negatives_are_drawn_with_the_seed() -> None:
    table = tokenised("para", [(A, B), *[(A, [30 + i]) for i in range(8)]], [1, *[0] * 8])
    positive = table.table.labels == 1
    known = Paraphrases(table, positive)
    drawn = [int(known.hard_negatives(~positive, seed)[0]) for seed in range(40)]
    assert drawn == [int(known.hard_negatives(~positive, seed)[0]) for seed in range(40)]
    assert set(drawn) == {2 * e + 1 for e in range(1, 9)}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"temperature": -1.0}, {}, r"simcse\.temperature: expected a number of at least 0\.001, found -1"),
        ({"temperature": 1e-40}, {}, r"simcse\.temperature: expected .* at least 0\.001, found 1e-40"),
        ({"weight": math.inf}, {}, r"simcse\.weight: expected a number above 0, found inf"),
        ({"batch_size": 1}, {}, r"simcse\.batch_size: .* expected at least 2, found 1"),
        ({}, {"batch_size": 1}, r"sst\.batch_size: simcse .* expected at least 2, found 1"),
        ({"tasks": ["cfimdb"]}, {}, r"simcse\.tasks: 'cfimdb' is not possible .*; possible: sst, para, sts"),
        ({"supervised": True}, {}, r"simcse\.tasks: 'sst' is not possible .*; possible: para, sts"),
        ({"tasks": ["para"], "supervised": True}, {"batch_size": 1}, r"para\.batch_size: simcse"),
        ({"tasks": ["sts"], "supervised": True, "threshold": 4.5}, {}, r"simcse\.threshold: .* found 1 of 3"),
        (
            {},
            {"mode": "last-linear-layer"},
            r"simcse\.tasks: needs a trained encoder, mode last-linear-layer",
        ),
    ],
)
def test_impossible_settings(changes: dict, settings: dict, message: str) -> None:
    run = context({"sst": SST, "para": PARA, "sts": STS}, **settings)
    with pytest.raises(ConfigError, match=message):
        build_simcse(SimCseConfig(**{"tasks": ["sst"], **changes}), run)


def test_what_is_possible_with_batches_of_one() -> None:
    run = context({"sst": SST, "para": PARA}, batch_size=1)
    assert build_simcse(SimCseConfig(["para"]), run) is not None  # its two sentences
    assert build_simcse(SimCseConfig(["sst"], batch_size=2), run) is not None
    assert build_simcse(SimCseConfig(), run) is None
    with pytest.raises(ConfigError, match="expected at least 2 different sentences of sst, found 1"):
        build_simcse(SimCseConfig(["sst"]), context({"sst": tokenised("sst", [(A,), (A,)], [0, 1])}))


def test_only_the_fraction_that_is_trained_on() -> None:
    """Neither other sentences nor other labels: pair 10 + i tells what differs from pair i."""
    texts = [([10 + i], [30 + i]) for i in range(10)] + [([10 + i], [50 + i]) for i in range(10)]
    labels = np.repeat([1, 0], 10)
    run = context({"para": tokenised("para", texts, labels.tolist())})
    run.task_configs["para"].train_fraction = 0.5
    used = TaskBatches(np.ones(20), 8, run.seed, "para", labels=labels, fraction=0.5).examples
    expected = {str(word) for i in used for (word,) in texts[i]}
    for size in (None, 4):
        sentences = build_simcse(SimCseConfig(["para"], batch_size=size), run)
        pairs = build_simcse(SimCseConfig(["para"], batch_size=size, supervised=True), run)
        assert sentences is not None
        assert pairs is not None
        data = sentences.streams()["para/simcse"]
        assert sorted(data.table.texts) == sorted((word, word) for word in expected)
        assert pairs.streams()["para/simcse"].table.texts == [
            (str(10 + i), str(30 + i), str(50 + i) if 10 + i in used else "") for i in used if i < 10
        ]
        chosen = sentences.examples({"para": used[3:5]}, 0)["para/simcse"]
        taken = {data.table.texts[i][0] for i in chosen}
        assert len(taken) == 4
        assert size is not None or taken == {str(word) for i in used[3:5] for (word,) in texts[i]}
    assert {10 + i in used for i in used if i < 10} == {True, False}

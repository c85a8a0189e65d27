"""Combinations of task gradients against textbook algorithms on explicit gradients, torchjd and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.optim.cone import cagrad_weights, nash_weights, upgrad_weights
from mtbert.optim.surgery import (
    Surgery,
    SurgeryConfig,
    UncertaintyWeights,
    cosines,
    gradvac,
    pcgrad,
    random_orders,
)


def conflicting(tasks: int, seed: int, width: int = 11) -> Tensor:
    """Gradients [tasks, width] many of which point against each other, of very different norms."""
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    gradients[1:] -= 0.8 * gradients[:1]
    return gradients * torch.tensor([10.0 ** (k % 3 - 1) for k in range(tasks)], dtype=torch.float64)[:, None]


def textbook_pcgrad(gradients: Tensor, orders: np.ndarray) -> Tensor:
    """Algorithm 1 of Yu et al. (2020) on explicit gradients: the projected gradients."""
    projected = gradients.clone()
    for i, order in enumerate(orders):
        for j in order:
            inner = projected[i] @ gradients[j]
            if inner < 0:
                projected[i] -= inner / (gradients[j] @ gradients[j]) * gradients[j]
    return projected


@pytest.mark.parametrize("tasks", [2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_is_the_textbook_algorithm(tasks: int, seed: int) -> None:
    gradients = conflicting(tasks, seed)
    orders = random_orders(tasks, seed, 17)
    mixed = pcgrad(gradients @ gradients.T, torch.from_numpy(orders))
    torch.testing.assert_close(mixed @ gradients, textbook_pcgrad(gradients, orders), rtol=1e-12, atol=1e-12)
    assert (mixed != torch.eye(tasks)).any()


@pytest.mark.parametrize("seed", range(4))
def test_pcgrad_and_gradvac_agree_with_torchjd(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    gradients = conflicting(3, seed)
    gram = gradients @ gradients.T
    vaccine = aggregation.GradVac(beta=0.3)
    targets = torch.zeros(3, 3, dtype=torch.float64)
    for step in range(5):
        orders = random_orders(3, seed, step)
        whole = iter([torch.tensor([*order, i]) for i, order in enumerate(orders)])
        others = iter(
            [torch.tensor([order.tolist().index(j) for j in sorted(order)]).argsort() for order in orders]
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda n, *_, given=whole: next(given))
            expected = aggregation.PCGrad()(gradients)
        torch.testing.assert_close(
            pcgrad(gram, torch.from_numpy(orders)).sum(0) @ gradients, expected, rtol=1e-9, atol=1e-9
        )
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda n, *_, given=others: next(given))
            expected = vaccine(gradients)
        mixed, targets = gradvac(gram, targets, torch.from_numpy(orders), 0.3)
        torch.testing.assert_close(mixed.sum(0) @ gradients, expected, rtol=1e-5, atol=1e-6)
        assert targets.abs().max() > 0


def test_gradvac_reaches_its_target_cosine() -> None:
    gradients = conflicting(2, 5)
    targets = torch.full((2, 2), 0.25, dtype=torch.float64)
    mixed, _ = gradvac(gradients @ gradients.T, targets, torch.from_numpy(random_orders(2, 0, 0)), 0.5)
    altered = mixed @ gradients
    for i, j in ((0, 1), (1, 0)):
        cosine = torch.nn.functional.cosine_similarity(altered[i], gradients[j], dim=0)
        assert float(cosine) == pytest.approx(0.25, abs=1e-12)


def test_orders_are_permutations_that_change_with_step_and_seed() -> None:
    seen = {tuple(random_orders(4, seed, step).flatten()) for seed in range(3) for step in range(20)}
    assert len(seen) > 55
    for order in random_orders(4, 1, 2):
        assert len(set(order)) == 3
    np.testing.assert_array_equal(random_orders(4, 1, 2), random_orders(4, 1, 2))
    firsts = [random_orders(3, 0, step)[0, 0] for step in range(400)]
    assert 150 < sum(first == 1 for first in firsts) < 250


def test_the_reference_variant_is_the_mean_and_takes_the_heads_along() -> None:
    gradients = conflicting(3, 2)
    surgery = Surgery(SurgeryConfig(method="pcgrad", variant="reference"), ("a", "b", "c"), 5)
    combined = surgery.combine(gradients @ gradients.T, ("a", "b", "c"), surgery.orders(3, 9))
    projected = textbook_pcgrad(gradients, random_orders(3, 5, 9))
    torch.testing.assert_close(combined.shared @ gradients, projected.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined.own, 3 * combined.shared, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_upgrad_solves_its_quadratic_programs(tasks: int, seed: int) -> None:
    gradients = conflicting(tasks, seed)
    transposed = gradients.T.numpy()
    gram = transposed.T @ transposed
    # With v = e_i + z, z >= 0, each projection is a non-negative least squares problem on the explicit gradients.
    expected = sum(bound + scipy.optimize.nnls(transposed, -transposed @ bound)[0] for bound in np.eye(tasks))
    found = upgrad_weights(torch.from_numpy(gram)).numpy()
    np.testing.assert_allclose(found @ gradients.numpy(), expected @ gradients.numpy(), rtol=1e-5, atol=1e-6)
    # No task's loss rises to first order: the result is in the dual cone.
    assert (gram @ found >= -1e-4 * np.sqrt(gram.diagonal())).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("c", [0.0, 0.4, 0.9])
def test_cagrad_solves_its_dual(seed: int, c: float) -> None:
    gradients = conflicting(3, seed)
    gram = (gradients @ gradients.T).numpy()
    mean = np.full(3, 1 / 3)
    radius = c * np.sqrt(mean @ gram @ mean)

    def objective(w: np.ndarray) -> float:
        return w @ gram @ mean + radius * np.sqrt(max(w @ gram @ w, 1e-300))

    best = min(
        (
            scipy.optimize.minimize(
                objective,
                start,
                bounds=[(0, 1)] * 3,
                constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                options={"ftol": 1e-15, "maxiter": 1000},
            )
            for start in (mean, *(0.8 * np.eye(3) + 0.2 / 3))
        ),
        key=lambda found: found.fun,
    ).x
    expected = 3 * (mean + radius * best / np.sqrt(best @ gram @ best))
    found = cagrad_weights(torch.from_numpy(gram), c).numpy()
    np.testing.assert_allclose(found @ gradients.numpy(), expected @ gradients.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_nash_weights_bargain(seed: int) -> None:
    gradients = conflicting(4, seed)
    gram = gradients @ gradients.T
    alpha = nash_weights(gram)
    assert (alpha > 0).all()
    product = alpha * (gram @ alpha)
    torch.testing.assert_close(product, product.mean().expand(4), rtol=1e-4, atol=0)
    assert float(alpha @ gram @ alpha) == pytest.approx(float(gram.sum()), rel=1e-4)


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad", "nash", "upgrad"])
@pytest.mark.parametrize("case", ["zero task", "all zero", "parallel", "opposite"])
def test_degenerate_gradients_give_finite_coefficients(method: str, case: str) -> None:
    gradients = conflicting(3, 0)
    if case == "zero task":
        gradients[1] = 0
    elif case == "all zero":
        gradients[:] = 0
    elif case == "parallel":
        gradients[:] = gradients[0]
    else:
        gradients[1] = -gradients[0]
    surgery = Surgery(SurgeryConfig(method=method), ("a", "b", "c"), 0)  # type: ignore[arg-type]
    for step in range(3):
        combined = surgery.combine(gradients @ gradients.T, ("a", "b", "c"), surgery.orders(3, step))
        assert torch.isfinite(combined.shared).all()


def test_orthogonal_gradients_are_left_alone() -> None:
    gram = torch.diag(torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64))
    for method in ("pcgrad", "gradvac", "upgrad"):
        surgery = Surgery(SurgeryConfig(method=method), ("a", "b", "c"), 0)  # type: ignore[arg-type]
        combined = surgery.combine(gram, ("a", "b", "c"), surgery.orders(3, 0))
        torch.testing.assert_close(combined.shared, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=1e-5)
        assert not combined.altered.any()


def test_gradvac_state_goes_on_where_it_stopped() -> None:
    config = SurgeryConfig(method="gradvac", gradvac_decay=0.5)
    names = ("a", "b", "c")
    whole, first = Surgery(config, names, 0), Surgery(config, names, 0)
    grams = [g @ g.T for g in (conflicting(3, seed) for seed in range(6))]
    expected = [whole.combine(gram, names, whole.orders(3, step)).shared for step, gram in enumerate(grams)]
    for step in range(3):
        first.combine(grams[step], names, first.orders(3, step))
    second = Surgery(config, names, 0)
    second.restore({name: value.clone() for name, value in first.state().items()})
    for step in range(3, 6):
        assert torch.equal(second.combine(grams[step], names, second.orders(3, step)).shared, expected[step])
    # A step may hold some of the tasks only, in any order: the running cosines go by name.
    assert second.combine(grams[0][:2, :2], ("c", "a"), second.orders(2, 6)).shared.shape == (2,)


def test_cosines_of_a_zero_gradient_are_zero() -> None:
    gram = torch.tensor([[4.0, -2.0, 0.0], [-2.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(cosines(gram), expected)


def test_uncertainty_weights_have_their_closed_form_optimum() -> None:
    weights = UncertaintyWeights({"sst": False, "sts": True}).double()
    losses = {"sst": torch.tensor(0.7, dtype=torch.float64), "sts": torch.tensor(0.02, dtype=torch.float64)}
    optimizer = torch.optim.LBFGS(weights.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = sum((weights(task, loss, 1.0) for task, loss in losses.items()), torch.zeros(()))
        total.backward()
        return total

    optimizer.step(closure)
    # d/ds (h e^-s L + s / 2) = 0 at e^s = 2 h L.
    torch.testing.assert_close(
        weights.log_variance.exp(), torch.tensor([1.4, 0.02]).double(), rtol=1e-3, atol=0
    )
    factors = weights.weights()
    assert {task: float(f) for task, f in factors.items()} == pytest.approx(
        {"sst": 1 / 1.4, "sts": 25}, rel=1e-3
    )
    assert not any(f.requires_grad for f in factors.values())
    parts = weights("sst", 0.25 * losses["sst"], 0.25) + weights("sst", 0.75 * losses["sst"], 0.75)
    torch.testing.assert_close(parts, weights("sst", losses["sst"], 1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradvac_decay": 0.0}, "surgery.gradvac_decay"),
        ({"cagrad_c": 1.0}, "surgery.cagrad_c"),
        ({"variant": "reference"}, "surgery.variant"),
    ],
)
def test_impossible_settings_name_the_field(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SurgeryConfig(**values)  # type: ignore[arg-type]

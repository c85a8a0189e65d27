"""SMART against its algorithm written out example by example, and what must not change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from support.assembly import Assembly, assemble, tiny_config
from support.twins import padded_rows, parameter_pairs, twin_of
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mtbert.data.packing import PackedBatch, pack, plan_passes
from mtbert.engine.forward import PackedForward, TrainingPass
from mtbert.errors import ConfigError
from mtbert.losses.divergence import OutputDivergence
from mtbert.losses.objective import Again
from mtbert.losses.smart import SmartConfig, SmartObjective, normal_noise, paper_step, reference_step
from mtbert.losses.task_losses import LossConfig
from mtbert.model.dropout import DropoutRates, DropoutStream
from mtbert.model.heads import HeadConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.reference import MultitaskBert
from mtbert.tasks.config import TaskConfig

STEP, ROWS = 5, 4
LARGE = {"noise_std": 0.02, "step_size": 0.04, "epsilon": 0.05}


def built(
    bert: Path, cache: Path, smart: SmartConfig, *, dropout: bool = False, **changes: object
) -> Assembly:
    """One single-sentence task, a pair in one row, and a pair of two rows; trained by SMART alone."""
    rate = 0.2 if dropout else 0.0
    heads = {
        "sst": HeadConfig(dropout=rate, hidden_layers=1),
        "para": HeadConfig(dropout=rate, pooling="pooler"),
        "sts": HeadConfig(dropout=rate, pooling="mean", pair=["cosine"]),
    }
    tasks = {
        name: TaskConfig(batch_size=ROWS, max_length=64, head=head, loss=LossConfig(weight=0.0))
        for name, head in heads.items()
    }
    config = tiny_config(bert, cache, **{"task": tasks, "max_tokens": 4096, "smart": smart, **changes})
    config.model.dropout = DropoutRates(0.1, 0.1, 0.1) if dropout else DropoutRates(0.0, 0.0, 0.0)
    assembly = assemble(config, rows=20)
    with torch.no_grad():  # heads as drawn have outputs near 0
        for parameter in assembly.model.heads.parameters():
            parameter.mul_(10)
    return assembly


def plan_of(assembly: Assembly) -> dict[str, np.ndarray]:
    return {name: np.arange(ROWS) + k for k, name in enumerate(assembly.config.tasks)}


def one_pass(assembly: Assembly, dtype: torch.dtype = torch.float64) -> tuple[TrainingPass, PackedBatch]:
    data = {name: splits["train"] for name, splits in assembly.data.items()}
    (requests,) = plan_passes(plan_of(assembly), data, 4096)
    forward = PackedForward(assembly.model, torch.device("cpu"), dtype)
    dropout = DropoutStream(assembly.config.seed, STEP)
    result = forward(requests, dropout)
    run = TrainingPass(
        forward, result, dropout=dropout, segments=None, examples={}, shares=(), step=STEP, progress=0.0
    )
    return run, pack(requests)


def objective_of(assembly: Assembly) -> SmartObjective:
    (objective,) = assembly.step.objectives
    assert isinstance(objective, SmartObjective)
    return objective


def trained(assembly: Assembly) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of one step."""
    result = assembly.step.accumulate(plan_of(assembly), STEP)
    gradients = {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}
    return result.objectives, gradients


def same(
    found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-13
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=name)


# ---- the algorithm, example by example ----


class Textbook:
    """Algorithm 1 for one example after another, on the padded reference network."""

    def __init__(self, assembly: Assembly) -> None:
        self.assembly = assembly
        self.config = assembly.config.smart
        self.twin: MultitaskBert = twin_of(assembly.model)
        self.twin.eval()

    def losses(self) -> dict[str, Tensor]:
        _, batch = one_pass(self.assembly)
        noise = normal_noise(batch.dropout_row, 32, seed=self.assembly.config.seed, step=STEP).double()
        found = {}
        for segment in batch.segments:
            total = torch.zeros((), dtype=torch.float64)
            for example in range(ROWS):
                first = segment.rows.start + example * segment.rows_per_example
                bounds = batch.cu_seqlens[first : first + segment.rows_per_example + 1].tolist()
                places = [slice(low, high) for low, high in pairwise(bounds)]
                texts = [(batch.input_ids[p].tolist(), batch.token_type_ids[p].tolist()) for p in places]
                total = total + self.example(segment.task, texts, [noise[p] for p in places]) / ROWS
            found[f"{segment.task}/smart"] = self.config.weight * total
        return found

    def example(self, task: str, texts: list, noise: Sequence[Tensor]) -> Tensor:
        config, width = self.config, [len(n) for n in noise]
        clean = self.outputs(task, texts, None)
        delta = config.noise_std * torch.cat(list(noise))
        for _ in range(config.steps):
            delta.requires_grad_()
            perturbed = self.outputs(task, texts, delta.split(width))
            loss = self.divergence(task, perturbed, clean.detach(), ascent=True) / ROWS
            (g,) = torch.autograd.grad(loss, delta)
            if config.projection == "paper":
                delta = delta.detach() + config.step_size * g / g.abs().max()
                ball = torch.full_like(delta, config.epsilon)
                delta = torch.minimum(torch.maximum(delta, -ball), ball)
            else:
                delta = delta.detach() + config.step_size * g
                norms = torch.linalg.vector_norm(delta, ord=float("inf"), dim=1, keepdim=True)
                delta = delta / (norms + config.epsilon)
        return self.divergence(task, self.outputs(task, texts, delta.split(width)), clean, ascent=False)

    def outputs(self, task: str, texts: list, delta: Sequence[Tensor] | None) -> Tensor:
        pending = None if delta is None else list(delta)
        embeddings = self.twin.bert.embeddings
        hook = embeddings.register_forward_hook(
            lambda _m, _i, x: x if pending is None else x + pending.pop(0)[None]
        )
        try:
            return self.twin(task, *(padded_rows([text], None) for text in texts))[0]
        finally:
            hook.remove()

    def divergence(self, task: str, p: Tensor, q: Tensor, ascent: bool) -> Tensor:
        name = self.config.divergence.get(task)
        if task == "sts":
            return ((p - q) / 5.0).pow(2).sum()
        if name == "mse":
            return F.mse_loss(p, q)
        if name == "squared":
            return (
                (p.softmax(0) - q.softmax(0)).pow(2).sum()
                if len(p) > 1
                else (p.sigmoid() - q.sigmoid()).pow(2).sum()
            )
        if self.config.projection == "paper":
            return kl(p, q) + kl(q, p)
        return kl(q, p) if ascent else kl(q.detach(), p) + kl(p.detach(), q)


def kl(p: Tensor, q: Tensor) -> Tensor:
    if len(p) == 1:
        return kl_divergence(Bernoulli(logits=p), Bernoulli(logits=q)).sum()
    return kl_divergence(Categorical(logits=p), Categorical(logits=q))


@pytest.mark.parametrize("projection", ["paper", "reference"])
@pytest.mark.parametrize(
    "divergence", [{}, {"sst": "squared", "para": "squared"}, {"sst": "mse", "para": "mse"}]
)
def test_losses_and_gradients_are_those_of_the_algorithm(
    tiny_bert: Path, tmp_path: Path, projection: str, divergence: dict
) -> None:
    size = {**LARGE, "step_size": 5.0} if projection == "reference" else LARGE
    smart = SmartConfig(
        ["sst", "para", "sts"], weight=3.0, steps=2, projection=projection, divergence=divergence, **size
    )
    assembly = built(tiny_bert, tmp_path, smart)
    textbook = Textbook(assembly)
    expected = textbook.losses()
    torch.stack(list(expected.values())).sum().backward()
    losses, _ = trained(assembly)
    assert all(loss > 1e-6 for loss in expected.values())
    same(losses, {name: loss.detach() for name, loss in expected.items()}, 1e-10)
    compared = 0
    for name, ours, theirs in parameter_pairs(assembly.model, textbook.twin, gradients=True):
        gradient, other = ours(), theirs()
        gradient = torch.zeros_like(other) if gradient is None and other is not None else gradient
        if other is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10, msg=name)
            compared += bool(other.abs().max() > 1e-6)
    assert compared > 30


# ---- the perturbation ----


def test_the_projected_noise_stays_in_the_ball_and_mostly_on_its_surface(
    tiny_bert: Path, tmp_path: Path
) -> None:
    assembly = built(tiny_bert, tmp_path, SmartConfig(["sst", "sts"], steps=3))
    run, _ = one_pass(assembly)
    noise = objective_of(assembly).ascend(run, ["sst", "sts"], run.outputs, run.fresh_dropout)
    assert noise.shape == (run.sub_batch(["sst", "sts"]).tokens, 32)
    assert noise.abs().max() == 1e-6
    assert (noise.abs() == 1e-6).double().mean() > 0.5


def test_reference_noise_has_a_norm_of_nearly_one_for_every_token(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = built(tiny_bert, tmp_path, SmartConfig(["sst", "sts"], projection="reference"))
    run, _ = one_pass(assembly)
    norms = objective_of(assembly).ascend(run, ["sst", "sts"], run.outputs, run.fresh_dropout).abs().amax(-1)
    assert norms.max() < 1
    assert norms.min() > 0.9


def test_steps_by_hand() -> None:
    noise = torch.tensor([[0.5, 0.0], [-0.5, 0.25], [0.0, 0.0]])
    gradient = torch.tensor([[2.0, -4.0], [1.0, 0.0], [0.0, 0.0]])
    found = paper_step(noise, gradient, torch.tensor([2, 1], dtype=torch.int32), step_size=0.4, epsilon=0.45)
    torch.testing.assert_close(found, torch.tensor([[0.45, -0.4], [-0.4, 0.25], [0.0, 0.0]]))
    found = reference_step(noise, gradient, step_size=0.5, epsilon=0.5)
    torch.testing.assert_close(found, torch.tensor([[1.5 / 2.5, -2.0 / 2.5], [0.0, 0.25 / 0.75], [0.0, 0.0]]))
    assert torch.equal(reference_step(noise * 0, gradient * 0, step_size=1.0, epsilon=0.0), noise * 0)


def test_initial_noise_is_normal_and_belongs_to_the_token() -> None:
    rows = torch.arange(400, dtype=torch.int32) * 4096 + 7
    noise = normal_noise(rows, 50, seed=2**40 + 3, step=9)
    assert noise.shape == (400, 50)
    assert noise.dtype == torch.float32
    assert kstest(noise.flatten().double().numpy(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T.double().numpy()) - np.eye(50)).max() < 0.25
    assert torch.equal(normal_noise(rows.flip(0), 50, seed=2**40 + 3, step=9), noise.flip(0))
    for other in (normal_noise(rows, 50, seed=3, step=9), normal_noise(rows, 50, seed=2**40 + 3, step=10)):
        assert (other != noise).double().mean() > 0.99


def test_the_ascent_touches_no_parameter(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly = built(tiny_bert, tmp_path, SmartConfig(["sst", "sts"], steps=2), dropout=True)
    run, _ = one_pass(assembly)
    for parameter in assembly.model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    wanted = [p.requires_grad for p in assembly.model.parameters()]
    again, passes = run.again, []

    def recorded(*args: Any, **options: Any) -> Again:
        passes.append(again(*args, **options))
        return passes[-1]

    monkeypatch.setattr(run, "again", recorded)
    noise = objective_of(assembly).ascend(run, ["sst", "sts"], run.outputs, run.fresh_dropout)
    assert not noise.requires_grad
    assert len(passes) == 2
    leaves = [p for p in assembly.model.parameters() if p.requires_grad]
    for found in passes:
        reached = torch.autograd.grad(found.outputs["sst"].sum(), leaves, allow_unused=True)
        assert all(gradient is None for gradient in reached)
    assert [p.requires_grad for p in assembly.model.parameters()] == wanted
    assert all((p.grad == 7.0).all() for p in assembly.model.parameters())


@pytest.mark.parametrize(("dropout", "masks"), [(False, "fresh"), (False, "same"), (True, "same")])
def test_without_noise_the_regulariser_is_exactly_zero(
    tiny_bert: Path, tmp_path: Path, dropout: bool, masks: str
) -> None:
    smart = SmartConfig(["sst", "sts"], noise_std=0.0, masks=masks)
    losses, gradients = trained(built(tiny_bert, tmp_path, smart, dropout=dropout))
    assert all(loss == 0 for loss in losses.values())
    assert all((gradient == 0).all() for gradient in gradients.values())
    smart = dataclasses.replace(smart, noise_std=1e-5)
    losses, _ = trained(built(tiny_bert, tmp_path, smart, dropout=dropout))
    assert all(0 < loss < 1e-6 for loss in losses.values())


# ---- packed, split, combined ----


@pytest.mark.parametrize("projection", ["paper", "reference"])
def test_tasks_together_are_the_tasks_alone(tiny_bert: Path, tmp_path: Path, projection: str) -> None:
    names = ["sst", "para", "sts"]
    smart = SmartConfig(names, projection=projection, **LARGE)
    losses, gradients = trained(built(tiny_bert, tmp_path, smart, dropout=True))
    alone = [
        trained(built(tiny_bert, tmp_path, dataclasses.replace(smart, tasks=[name]), dropout=True))
        for name in names
    ]
    same(losses, {name: loss for found, _ in alone for name, loss in found.items()}, 1e-10)
    sums: dict[str, Tensor] = {}
    for _, part in alone:
        for name, gradient in part.items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient
    same(gradients, sums)


@pytest.mark.parametrize(("projection", "masks"), [("paper", "fresh"), ("reference", "same")])
def test_the_split_into_passes_changes_nothing(
    tiny_bert: Path, tmp_path: Path, projection: str, masks: str
) -> None:
    smart = SmartConfig(["sst", "sts"], projection=projection, masks=masks, steps=2, **LARGE)
    losses, gradients = trained(built(tiny_bert, tmp_path, smart, dropout=True))
    split = built(tiny_bert, tmp_path, smart, dropout=True, max_tokens=128)
    data = {name: splits["train"] for name, splits in split.data.items()}
    assert len(plan_passes(plan_of(split), data, 128)) > 2
    parts = trained(split)
    same(parts[0], losses)
    same(parts[1], gradients)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_gradient_surgery_gets_the_same_from_one_backward_pass(
    tiny_bert: Path, tmp_path: Path, mode: str
) -> None:
    smart = SmartConfig(["sst", "sts"], **LARGE)
    found = {}
    for way in ("one-pass", "per-task"):
        surgery = SurgeryConfig("pcgrad", gradients=way)
        _, found[way] = trained(built(tiny_bert, tmp_path, smart, dropout=True, mode=mode, surgery=surgery))
    same(found["one-pass"], found["per-task"])
    assert any(gradient.abs().max() > 0 for gradient in found["per-task"].values())
    if mode == "lora":
        assert not any(name.endswith("query_key_value.weight") for name in found["one-pass"])


def test_passes_that_differ_by_the_noise_alone_run_in_float32(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = built(tiny_bert, tmp_path, SmartConfig(["sst", "sts"]))
    assembly.model.float()
    objective = objective_of(assembly)
    losses = {}
    for dtype in (torch.bfloat16, torch.float32):
        own = SmartObjective(
            objective.config, objective.divergences, seed=0, width=32, dtype=dtype, independent=False
        )
        losses[dtype] = own.losses(one_pass(assembly, dtype)[0])
    assert losses[torch.bfloat16].keys() == {"sst", "sts"}
    for task, loss in losses[torch.bfloat16].items():
        assert torch.equal(loss, losses[torch.float32][task])
    assembly.model.double()
    exact = objective.losses(one_pass(assembly)[0])
    for task, loss in losses[torch.float32].items():
        assert loss.item() == pytest.approx(exact[task].item(), rel=0.05)


# ---- divergences ----


def test_divergences_stay_exact_close_by_and_finite_far_away() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5, generator=generator)
    near = logits + 1e-3 * torch.randn(50, 5, generator=generator)
    for kind, width in (("classification", 5), ("binary", 1)):
        kl_of = OutputDivergence("kl", kind)
        a, b = logits[:, :width], near[:, :width]
        expected = torch.stack([kl(x, y) + kl(y, x) for x, y in zip(a.double(), b.double(), strict=True)])
        torch.testing.assert_close(kl_of(a, b), expected.float(), rtol=0.02, atol=1e-12)
        far = torch.full((1, width), 1e4)
        far[:, 0] = -1e4
        first = far.clone().requires_grad_()
        value = kl_of(first, -far)
        assert torch.isfinite(value).all()
        assert torch.isfinite(torch.autograd.grad(value.sum(), first)[0]).all()
        assert (kl_of(a, a) == 0).all()


# ---- errors ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": -1e-6}, "smart.epsilon: expected a number of at least 0, found -1e-06"),
        ({"step_size": -1.0}, "smart.step_size: expected a number of at least 0"),
        ({"noise_std": float("nan")}, "smart.noise_std: expected a number of at least 0"),
        ({"weight": float("inf")}, "smart.weight: expected a number above 0"),
        ({"weight": 0.0}, "smart.weight: expected a number above 0, found 0.0"),
        ({"steps": 0}, "smart.steps: expected at least 1, found 0"),
        ({"projection": "ball"}, "smart.projection: found 'ball'; possible: paper, reference"),
        ({"masks": "none"}, "smart.masks: found 'none'; possible: fresh, same"),
        (
            {"divergence": {"sst": "js"}},
            "smart.divergence: unknown divergence 'js' of task sst; possible: kl",
        ),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        SmartConfig(**changes)


@pytest.mark.parametrize(
    ("smart", "mode", "message"),
    [
        (
            SmartConfig(["sst", "cola"]),
            "full",
            "smart.tasks: 'cola' is not possible; possible: sst, para, sts",
        ),
        (SmartConfig(["sst", "sst"]), "full", "smart.tasks: a task is named twice"),
        (SmartConfig(["sst"], divergence={"sts": "mse"}), "full", "smart.divergence: 'sts' is not possible"),
        (
            SmartConfig(["sts"], divergence={"sts": "kl"}),
            "full",
            "smart.divergence: kl is not possible for sts",
        ),
        (
            SmartConfig(["sst"]),
            "last-linear-layer",
            "smart.tasks: needs a pass through the encoder, mode last-linear-layer computes it once",
        ),
    ],
)
def test_impossible_for_these_tasks(
    tiny_bert: Path, tmp_path: Path, smart: SmartConfig, mode: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        assemble(tiny_config(tiny_bert, tmp_path, smart=smart, mode=mode))


@pytest.mark.parametrize("masks", ["fresh", "same"])
@pytest.mark.parametrize("hidden", [0.0, 0.1], ids=["nothing drops", "the encoder drops"])
def test_masks_after_it_do_not_depend_on_which_pass_holds_its_rows(
    tiny_bert: Path, tmp_path: Path, masks: Any, hidden: float
) -> None:
    """Passes and ranks without its rows number the next masks as those with them."""
    config = tiny_config(tiny_bert, tmp_path, smart=SmartConfig(tasks=["sst"], masks=masks, steps=2))
    config.model.dropout = DropoutRates(embedding=hidden, attention=hidden, hidden=hidden)
    assembly = assemble(config)
    numbers = []
    for tasks in (["sst", "para"], ["para"]):
        data = {name: assembly.data[name]["train"] for name in tasks}
        (requests,) = plan_passes({name: np.arange(ROWS) for name in tasks}, data, 4096)
        forward = PackedForward(assembly.model, torch.device("cpu"), torch.float64)
        dropout = DropoutStream(assembly.config.seed, STEP)
        result = forward(requests, dropout)
        run = TrainingPass(
            forward, result, dropout=dropout, segments=None, examples={}, shares=(), step=STEP, progress=0.0
        )
        objective_of(assembly).losses(run)
        numbers.append(run.fresh_dropout().forward_pass)
    assert numbers[0] == numbers[1] > 1

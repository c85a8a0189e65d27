"""Task gradients from one backward pass against steps that train one task alone; surgery on explicit gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from torch import Tensor

from mtbert.config import TrainConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.model.heads import HeadConfig
from mtbert.optim.surgery import Combined, Surgery, SurgeryConfig, random_orders
from mtbert.tasks.config import TaskConfig

TASKS = ("sst", "para", "sts")
STEP = 3


def configured(bert: Path, cache: Path, **changes: object) -> TrainConfig:
    """Three tasks, one of each kind of rows, two of them through the pooler; dropout everywhere."""
    heads = {
        "sst": HeadConfig(dropout=0.2, pooling="pooler"),
        "para": HeadConfig(dropout=0.2, pooling="mean", pair=["concat", "difference"], hidden_layers=1),
        "sts": HeadConfig(dropout=0.2, pooling="pooler"),
    }
    tasks = {
        name: TaskConfig(batch_size=size, max_length=64, head=heads[name])
        for name, size in zip(TASKS, (6, 5, 4), strict=True)
    }
    tasks["para"].loss.weight = 2.5
    return tiny_config(bert, cache, task=tasks, **changes)


def plan_of(assembly: Assembly) -> dict[str, object]:
    return {name: batches.batch(0) for name, batches in assembly.batches.items()}


def perturbed(assembly: Assembly) -> Assembly:
    """LoRA's B is zero at first, which would leave A without a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in assembly.model.named_parameters():
            if "lora_b" in name:
                parameter.normal_(0.0, 0.05, generator=generator)
    return assembly


def gradients(assembly: Assembly) -> dict[str, Tensor]:
    assembly.step.accumulate(plan_of(assembly), STEP)
    return {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


def alone(config: TrainConfig, task: str, weight: float | None = None) -> dict[str, Tensor]:
    """The gradient of one task: the same step with the losses of the others left out. weight: of para's loss."""
    assembly = perturbed(assemble(replace(config, surgery=SurgeryConfig())))
    if weight is not None:
        assembly.step.losses["para"].weight = weight
    for other in TASKS:
        if other != task:
            assembly.step.losses[other].weight = 0.0
    for objective in assembly.step.objectives:
        whole = objective.losses
        objective.losses = lambda run, whole=whole: {t: v for t, v in whole(run).items() if t == task}
    return gradients(assembly)


def one_hot(place: int) -> Callable[..., Combined]:
    def combine(self: Surgery, gram: Tensor, tasks: tuple[str, ...], step: int) -> Combined:
        weights = torch.zeros_like(gram[0])
        weights[place] = 1.0
        return Combined(weights, torch.ones_like(weights), torch.zeros_like(gram, dtype=torch.bool))

    return combine


@pytest.mark.parametrize(
    ("mode", "source", "max_tokens"),
    [
        ("full", "one-pass", 4096),
        ("full", "one-pass", 150),
        ("full", "per-task", 150),
        ("lora", "one-pass", 150),
        ("lora", "per-task", 4096),
        ("bitfit", "one-pass", 150),
        ("last-linear-layer", "one-pass", 150),
    ],
)
def test_every_parameter_gets_the_gradient_of_each_task(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, source: str, max_tokens: int
) -> None:
    """With dropout on, in one pass and split into several."""
    surgery = SurgeryConfig(measure=True, gradients=source)  # type: ignore[arg-type]
    config = configured(tiny_bert, tmp_path, mode=mode, surgery=surgery, max_tokens=max_tokens)
    explicit = {task: alone(config, task) for task in TASKS}
    for place, task in enumerate(TASKS):
        with monkeypatch.context() as patch:
            patch.setattr(Surgery, "combine", one_hot(place))
            assembly = perturbed(assemble(config))
            found = gradients(assembly)
        shared = {name for name, _ in assembly.model.shared_parameters()}
        assert found.keys() >= explicit[task].keys()
        assert mode == "last-linear-layer" or len(shared & found.keys()) > 5
        for name, gradient in found.items():
            if name in shared:
                expected = explicit[task].get(name, torch.zeros_like(gradient))
            else:
                expected = sum(parts[name] for parts in explicit.values() if name in parts)
            torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13, msg=f"{task}: {name}")


@pytest.mark.parametrize(
    ("mode", "source", "max_tokens"),
    [
        ("full", "one-pass", 4096),
        ("full", "per-task", 4096),
        ("full", "one-pass", 300),
        ("lora", "one-pass", 4096),
        ("lora", "one-pass", 300),
    ],
)
def test_objectives_add_to_the_gradient_of_their_own_task(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, source: str, max_tokens: int
) -> None:
    """Also where a step takes several passes; the negatives of SimCSE are those of the pass."""
    config = configured(
        tiny_bert,
        tmp_path,
        mode=mode,
        surgery=SurgeryConfig(measure=True, gradients=source),  # type: ignore[arg-type]
        simcse=SimCseConfig(tasks=["sst", "sts"], weight=0.5),
        smart=SmartConfig(tasks=["sst", "para"], weight=0.5, noise_std=1e-2, epsilon=1e-1, step_size=1e-2),
        max_tokens=max_tokens,
    )
    plain = configured(tiny_bert, tmp_path, mode=mode, max_tokens=max_tokens)
    for place, task in enumerate(TASKS):
        expected = alone(config, task)
        with monkeypatch.context() as patch:
            patch.setattr(Surgery, "combine", one_hot(place))
            found = gradients(perturbed(assemble(config)))
        without = alone(plain, task)
        changed = [
            n for n in without if n.startswith("encoder.") and not without[n].allclose(expected[n], rtol=1e-3)
        ]
        assert len(changed) > 5
        for name, gradient in found.items():
            if name.startswith("encoder."):
                want = expected.get(name, torch.zeros_like(gradient))
                torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-13, msg=f"{task}: {name}")


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("source", ["one-pass", "per-task"])
def test_a_pcgrad_step_is_the_textbook_on_explicit_gradients(
    tiny_bert: Path, tmp_path: Path, source: str, variant: str
) -> None:
    surgery = SurgeryConfig(method="pcgrad", variant=variant, gradients=source)  # type: ignore[arg-type]
    config = configured(tiny_bert, tmp_path, surgery=surgery, max_tokens=4096)
    assembly = assemble(config)
    assembly.step.losses["para"].weight = -2.5  # whom para agreed with, it contradicts
    found = gradients(assembly)
    parts = [alone(config, task, -2.5) for task in TASKS]
    heads = [name for name in found if name.startswith("heads.")]
    chosen = [n for n, _ in assembly.model.shared_parameters() if n in found]
    if variant == "reference":
        chosen += heads
    flat = torch.stack(
        [torch.cat([p.get(n, torch.zeros_like(found[n])).flatten() for n in chosen]) for p in parts]
    )
    projected = flat.clone()
    conflicts = 0
    for i, order in enumerate(random_orders(3, config.seed, STEP)):
        for j in order:
            inner = projected[i] @ flat[j]
            if inner < 0:
                conflicts += 1
                projected[i] -= inner / (flat[j] @ flat[j]) * flat[j]
    assert conflicts
    combined = projected.sum(0)
    start = 0
    for name in chosen:
        size = found[name].numel()
        expected = combined[start : start + size].view_as(found[name])
        if variant == "reference" and name not in heads:
            expected = expected / 3
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=name)
        start += size
    if variant == "paper":
        for name in heads:
            torch.testing.assert_close(found[name], sum(p[name] for p in parts if name in p), msg=name)


def test_the_report_holds_cosines_norms_and_conflicts(tiny_bert: Path, tmp_path: Path) -> None:
    config = configured(tiny_bert, tmp_path, surgery=SurgeryConfig(method="pcgrad"))
    assembly = assemble(config)
    assembly.step.losses["para"].weight = -2.5
    result = assembly.step.accumulate(plan_of(assembly), STEP)
    report = result.gradients.to_json()
    shared = {name for name, _ in assembly.model.shared_parameters()}
    flat = [
        torch.cat([g.flatten() for n, g in sorted(alone(config, task).items()) if n in shared])
        for task in ("sst", "sts")  # both train every shared parameter
    ]
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert report["cosine"]["sst/sts"] == pytest.approx(float(cosine), rel=1e-9)
    assert report["norm"]["sts"] == pytest.approx(float(flat[1].norm()), rel=1e-9)
    conflicts = [pair for pair, value in report["cosine"].items() if value < 0]
    assert conflicts
    for pair in conflicts:
        i, j = pair.split("/")
        assert report["altered"][f"{i}/{j}"] or report["altered"][f"{j}/{i}"]


def test_a_step_of_one_task_needs_no_surgery(tiny_bert: Path, tmp_path: Path) -> None:
    config = configured(tiny_bert, tmp_path, surgery=SurgeryConfig(method="pcgrad"))
    assembly = assemble(config)
    result = assembly.step.accumulate({"sts": assembly.batches["sts"].batch(0)}, STEP)
    assert result.gradients is None
    plain = assemble(replace(config, surgery=SurgeryConfig()))
    plain.step.accumulate({"sts": plain.batches["sts"].batch(0)}, STEP)
    for name, parameter in plain.model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, dict(assembly.model.named_parameters())[name].grad)

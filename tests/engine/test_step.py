"""One training step: passes add up to the large batch, NaN never reaches the weights, features are exact."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config

from mtbert.errors import NonFiniteError
from mtbert.model.dropout import DropoutRates
from mtbert.model.heads import HeadConfig
from mtbert.tasks.config import TaskConfig


def gradients(assembly: Assembly, step: int = 3) -> dict[str, torch.Tensor]:
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    assembly.step.accumulate(plan, step)
    return {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["full", "lora", "last-linear-layer"])
@pytest.mark.parametrize("pair", ["cross-encoder", ["concat", "difference"]])
def test_passes_give_the_gradient_of_the_whole_step(
    tiny_bert: Path, tmp_path: Path, mode: str, pair: object
) -> None:
    single = HeadConfig(dropout=0.2, pooling="mean")
    heads = {"sst": single, "para": replace(single, pair=pair), "sts": replace(single, pair=pair)}
    tasks = {name: TaskConfig(batch_size=6, max_length=64, head=head) for name, head in heads.items()}
    whole = assemble(tiny_config(tiny_bert, tmp_path, mode=mode, task=tasks, max_tokens=4096))
    split = assemble(tiny_config(tiny_bert, tmp_path, mode=mode, task=tasks, max_tokens=128))
    expected, found = gradients(whole), gradients(split)
    assert expected.keys() == found.keys()
    assert any(g.abs().max() > 0 for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_changes_with_the_step_and_not_between_calls(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path))
    first, again, later = gradients(assembly, 3), gradients(assembly, 3), gradients(assembly, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], later[name]) for name in first)


def test_reported_losses_are_the_means_of_the_step(tiny_bert: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_bert, tmp_path)
    config.model.dropout = DropoutRates(0.0, 0.0, 0.0)
    config.task = {
        n: TaskConfig(batch_size=6, max_length=64, head=HeadConfig(dropout=0.0)) for n in config.tasks
    }
    config.task["para"].loss.weight = 3.0
    assembly = assemble(config)
    plan = {name: batches.batch(1) for name, batches in assembly.batches.items()}
    result = assembly.step.accumulate(plan, 0)
    for name, examples in plan.items():
        data = assembly.data[name]["train"]
        from mtbert.engine.inference import infer

        outputs = torch.from_numpy(infer(assembly.forward, data, max_tokens=512, examples=examples))
        labels = torch.from_numpy(data.labels[examples])
        mean = assembly.losses[name].per_example(outputs, labels).mean()
        assert float(result.losses[name]) == pytest.approx(float(mean), rel=1e-5)
    total = sum(float(v) * (3.0 if n == "para" else 1.0) for n, v in result.losses.items())
    assert float(result.total) == pytest.approx(total, rel=1e-9)


def test_clipping_scales_the_gradient_to_the_limit(tiny_bert: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_bert, tmp_path)
    config.optim.clip_norm = 1e-3
    assembly = assemble(config)
    result = assembly.step({name: b.batch(0) for name, b in assembly.batches.items()}, 0)
    assert float(result.grad_norm) > 1e-3
    norm = torch.nn.utils.get_total_norm([p.grad for p in assembly.step.parameters if p.grad is not None])
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_what_a_gpu_will_copy_is_made_ready_in_pinned_memory(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_bert, tmp_path, max_tokens=128)
    config.surgery.method = "pcgrad"
    assembly = assemble(config)
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    plain = assembly.step.prepare(plan, 0)
    assert not pinned
    assembly.forward.device = torch.device("cuda")  # type: ignore[misc]
    ready = assembly.step.prepare(plan, 0)
    found = [ready.words]
    for before, each in zip(plain.passes, ready.passes, strict=True):
        assert before.batch is not None
        assert each.batch is not None
        assert torch.equal(before.batch.input_ids, each.batch.input_ids)
        found += [value for value in vars(each.batch).values() if isinstance(value, torch.Tensor)]
        found += [tensor for s in each.batch.segments for tensor in (s.labels, s.weights)]
    assert {id(tensor) for tensor in found} == {id(tensor) for tensor in pinned}
    assert len(ready.passes) > 1


def planted(assembly: Assembly, parameter: str) -> None:
    with torch.no_grad():
        dict(assembly.model.named_parameters())[parameter].view(-1)[0] = float("nan")


def test_a_non_finite_loss_names_task_step_and_examples_and_spares_the_weights(
    tiny_bert: Path, tmp_path: Path
) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path), dtype=torch.float32)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    assembly.step(plan, 0).check()
    planted(assembly, "heads.para.output.weight")
    before = copy.deepcopy(assembly.model.state_dict())
    moments = copy.deepcopy(assembly.step.optimizer.state_dict()["state"])
    result = assembly.step(plan, 7)
    for name, value in assembly.model.state_dict().items():
        assert torch.equal(value.nan_to_num(123.0), before[name].nan_to_num(123.0)), name
    for index, state in assembly.step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[k], moments[index][k]) for k in state)
    with pytest.raises(NonFiniteError, match=r"step 8: .*task para: examples synthetic-para-train") as caught:
        result.check()
    assert "task sst" not in str(caught.value)


def test_a_non_finite_gradient_with_finite_losses_stops_too(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path), dtype=torch.float32)
    parameter = dict(assembly.model.named_parameters())["heads.sst.output.weight"]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = parameter.detach().clone()
    result = assembly.step({name: b.batch(0) for name, b in assembly.batches.items()}, 2)
    assert torch.equal(parameter.detach(), before)
    with pytest.raises(NonFiniteError, match="step 3: every loss is finite, but the gradient is not"):
        result.check()


def test_frozen_features_equal_the_packed_pass(tiny_bert: Path, tmp_path: Path) -> None:
    from mtbert.engine.forward import PackedForward
    from mtbert.engine.inference import infer

    tasks = {
        "sst": TaskConfig(head=HeadConfig(pooling="mean")),
        "para": TaskConfig(head=HeadConfig(pooling="pooler", pair=["concat", "product"])),
        "sts": TaskConfig(head=HeadConfig(pooling="cls", pair=["cosine"])),
    }
    config = tiny_config(tiny_bert, tmp_path, mode="last-linear-layer", task=tasks, max_tokens=2048)
    assembly = assemble(config)
    packed = PackedForward(assembly.model, torch.device("cpu"), torch.float64)
    for splits in assembly.data.values():
        chosen = np.array([5, 0, 17, 3])
        expected = infer(packed, splits["train"], max_tokens=2048, examples=chosen)
        found = infer(assembly.forward, splits["train"], max_tokens=2048, examples=chosen)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


def test_inference_does_not_depend_on_the_token_budget(tiny_bert: Path, tmp_path: Path) -> None:
    from mtbert.engine.inference import infer

    assembly = assemble(tiny_config(tiny_bert, tmp_path))
    data = assembly.data["para"]["dev"]
    np.testing.assert_allclose(
        infer(assembly.forward, data, max_tokens=64),
        infer(assembly.forward, data, max_tokens=10_000),
        rtol=1e-6,
        atol=1e-7,
    )


def test_a_step_without_anything_to_learn_from_changes_nothing(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path))
    assembly.step.losses["sts"].weight = 0.0
    before = copy.deepcopy(assembly.model.state_dict())
    result = assembly.step({"sts": assembly.batches["sts"].batch(0)}, 0)
    result.check()
    assert float(result.total) == 0.0
    assert float(result.losses["sts"]) > 0
    assert all(torch.equal(value, before[name]) for name, value in assembly.model.state_dict().items())

"""fp16: the loss scale follows torch.amp's rules, and nothing but the backward pass sees it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtbert.engine import loss_scale
from mtbert.engine.loss_scale import INITIAL, MOST_SKIPPED, LossScaler
from mtbert.engine.window import Window
from mtbert.errors import NonFiniteError
from mtbert.losses.smart import SmartConfig
from mtbert.optim.surgery import SurgeryConfig

CPU = torch.device("cpu")
FP16 = torch.float16


def plan_of(assembly: Assembly) -> dict[str, Any]:
    return {name: batches.batch(0) for name, batches in assembly.batches.items()}


def gradients(assembly: Assembly) -> dict[str, Tensor]:
    assembly.step.accumulate(plan_of(assembly), 3)
    return {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


def scaler_of(assembly: Assembly) -> LossScaler:
    scaler = assembly.step.scaler
    assert scaler is not None
    return scaler


def overflowing(assembly: Assembly) -> None:
    """The next step's gradients will not fit into float16."""
    scaler_of(assembly).scale.fill_(2.0**40)


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    left, right = (torch.cat([each[name].flatten().double() for name in sorted(each)]) for each in (a, b))
    return float(left @ right / (left.norm() * right.norm()))


def test_the_scale_moves_as_torch_s_grad_scaler_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random sequence of overflows, with updates by torch's own AdamW beside it."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(7, generator=generator)
    theirs, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    their_optimizer, our_optimizer = (torch.optim.AdamW([p], lr=0.1, fused=True) for p in (theirs, ours))
    peer = torch.amp.GradScaler("cpu", init_scale=INITIAL, growth_interval=4)
    scaler = LossScaler(CPU)
    skipped = 0
    for _ in range(120):
        target = torch.randn(7, generator=generator)
        factor = torch.inf if torch.rand((), generator=generator) < 0.3 else 1.0
        their_optimizer.zero_grad()
        peer.scale((theirs * target).sum() * factor).backward()
        peer.step(their_optimizer)
        peer.update()

        our_optimizer.zero_grad()
        sum(scaler.scaled({"a": (ours * target).sum() * factor}).values()).backward()
        assert ours.grad is not None
        scaler.unscale([ours.grad])
        finite = torch.isfinite(ours.grad).all()
        our_optimizer.found_inf, our_optimizer.grad_scale = (~finite).float(), None  # type: ignore[attr-defined]
        our_optimizer.step()
        report = scaler.report(finite)
        scaler.update(finite)

        skipped = 0 if finite else skipped + 1
        assert float(scaler.scale) == peer.get_scale()
        assert int(scaler.good_steps) == peer._get_growth_tracker()
        assert int(scaler.skipped) == int(report.skipped) == skipped
        assert torch.equal(ours, theirs)
    assert peer.get_scale() != INITIAL


def test_the_scale_never_grows_to_infinity() -> None:
    scaler = LossScaler(CPU)
    scaler.scale.fill_(2.0**127)
    scaler.good_steps.fill_(loss_scale.GROWTH_INTERVAL - 1)
    scaler.update(torch.tensor(True))
    assert float(scaler.scale) == 2.0**127
    assert int(scaler.good_steps) == 0


@pytest.mark.parametrize(
    "surgery",
    [
        SurgeryConfig(),
        SurgeryConfig(method="pcgrad"),
        SurgeryConfig(method="pcgrad", gradients="per-task"),
    ],
    ids=["sum", "one pass", "per task"],
)
def test_gradients_and_surgery_are_those_of_float32_to_float16_s_accuracy(
    tiny_bert: Path, tmp_path: Path, surgery: SurgeryConfig
) -> None:
    """In several passes, whose scaled gradients add up."""
    config = tiny_config(tiny_bert, tmp_path, surgery=surgery, max_tokens=150)
    wide, half = assemble(config, dtype=torch.float32), assemble(config, dtype=FP16)
    expected, found = gradients(wide), gradients(half)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert cosine(expected, found) > 0.9999
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-6, name
    plan = plan_of(wide)
    reports = [each.step.accumulate(plan, 5) for each in (wide, half)]
    assert float(reports[1].grad_norm) == pytest.approx(float(reports[0].grad_norm), rel=5e-3)
    assert float(reports[1].total) == pytest.approx(float(reports[0].total), rel=5e-3)
    if surgery.method != "sum":
        grams = [each.gradients.gram for each in reports if each.gradients is not None]
        torch.testing.assert_close(
            grams[1], grams[0], rtol=0.02, atol=0.01 * float(grams[0].diagonal().mean())
        )


def test_the_scale_is_what_keeps_small_gradients(tiny_bert: Path, tmp_path: Path) -> None:
    """With tiny losses, float16 without a scale loses nearly everything."""
    config = tiny_config(tiny_bert, tmp_path)
    for name in config.tasks:
        config.task[name].loss.weight = 1e-6
    expected = gradients(assemble(config, dtype=torch.float32))
    scaled = assemble(config, dtype=FP16)
    assert cosine(expected, gradients(scaled)) > 0.999
    bare = assemble(config, dtype=FP16)
    scaler_of(bare).scale.fill_(1.0)
    found = gradients(bare)
    name = "encoder.layers.0.intermediate.weight"
    assert float(cosine({"x": expected[name]}, {"x": found[name] + 1e-30})) < 0.9


@pytest.mark.parametrize("surgery", ["sum", "gradvac", "nash"])
def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(
    tiny_bert: Path, tmp_path: Path, surgery: Any
) -> None:
    config = tiny_config(tiny_bert, tmp_path, surgery=SurgeryConfig(method=surgery))
    assembly = assemble(config, dtype=FP16)
    step, plan, scaler = assembly.step, plan_of(assembly), scaler_of(assembly)
    assert step(plan, 0).check()
    kept = copy.deepcopy(
        (
            assembly.model.state_dict(),
            step.optimizer.state_dict()["state"],
            {n: v for n, v in step.state().items() if n.startswith("surgery/")},
        )
    )
    overflowing(assembly)
    result = step(plan, 1)
    assert not result.check()
    now = (
        assembly.model.state_dict(),
        step.optimizer.state_dict()["state"],
        {n: v for n, v in step.state().items() if n.startswith("surgery/")},
    )
    for name, value in now[0].items():
        assert torch.equal(value, kept[0][name]), name
    for place, state in now[1].items():
        assert all(torch.equal(state[entry], kept[1][place][entry]) for entry in state)
    assert all(torch.equal(value, kept[2][name]) for name, value in now[2].items())
    assert surgery != "gradvac" or now[2]
    assert float(scaler.scale) == 2.0**39
    scaler.scale.fill_(INITIAL)
    assert step(plan, 2).check()
    assert float(result.scaling.scale) == 2.0**40  # type: ignore[union-attr]


def test_a_window_leaves_skipped_steps_out_of_its_means(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path), dtype=FP16)
    plan, window = plan_of(assembly), Window()
    good = assembly.step(plan, 0)
    overflowing(assembly)
    for result in (good, assembly.step(plan, 1)):
        window.add(result)
    line = window.to_json()
    assert line["skipped"] == 1
    assert line["loss_scale"] == 2.0**40
    assert line["total_loss"] == float(good.total)
    assert line["grad_norm"] == float(good.grad_norm)
    window = Window()
    window.add(assembly.step(plan, 2))
    line = window.to_json()
    assert line["skipped"] == 1
    assert not line["loss"]
    assert "grad_norm" not in line


def test_twenty_skipped_steps_in_a_row_end_the_run(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path), dtype=FP16)
    step, plan = assembly.step, plan_of(assembly)
    with torch.no_grad():
        dict(assembly.model.named_parameters())["heads.para.output.weight"].view(-1)[0] = torch.nan
    scaler_of(assembly).skipped.fill_(MOST_SKIPPED - 3)
    for number in (17, 18):
        assert not step(plan, number).check()
    saved = copy.deepcopy(step.state())
    last = step(plan, 19)
    expected = r"step 20, skipped as the 19 steps before it, though the loss scale fell to 16384: "
    with pytest.raises(NonFiniteError, match=expected) as caught:
        last.check()
    assert "task para: examples synthetic-para-train" in str(caught.value)
    assert "precision bf16 or float32" in str(caught.value)
    # A resumed run goes on counting where the checkpoint was taken.
    other = assemble(tiny_config(tiny_bert, tmp_path), dtype=FP16).step
    other.restore(saved)
    scaler = other.scaler
    assert scaler is not None
    assert int(scaler.skipped) == MOST_SKIPPED - 1
    assert float(scaler.scale) == INITIAL / 4


def test_a_good_step_forgives_the_skipped_ones(tiny_bert: Path, tmp_path: Path) -> None:
    assembly = assemble(tiny_config(tiny_bert, tmp_path), dtype=FP16)
    step, plan, scaler = assembly.step, plan_of(assembly), scaler_of(assembly)
    scaler.skipped.fill_(MOST_SKIPPED - 1)
    assert step(plan, 0).check()
    overflowing(assembly)
    assert not step(plan, 1).check()
    assert int(scaler.skipped) == 1


class NoHostReads(TorchDispatchMode):
    """Fails where a device's value would come to the host, for which a GPU would have to be waited for."""

    FORBIDDEN = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select", "unique")

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name.lstrip("_") not in {each.lstrip("_") for each in self.FORBIDDEN}, (
            f"{name} reads the device"
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "method"), [(FP16, "gradvac"), (torch.float32, "nash")], ids=["float16", "float32"]
)
def test_no_step_reads_the_device(tiny_bert: Path, tmp_path: Path, dtype: torch.dtype, method: Any) -> None:
    config = tiny_config(tiny_bert, tmp_path, surgery=SurgeryConfig(method=method))
    config.smart = SmartConfig(tasks=["sst"])
    assembly = assemble(config, dtype=dtype)
    plan = plan_of(assembly)
    assembly.step(plan, 0)
    with NoHostReads():
        result = assembly.step(plan, 1)
    assert result.check()


def test_the_guard_against_host_reads_sees_them() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="reads the device"):
        float(torch.ones(()))


def test_other_precisions_have_no_scale(tiny_bert: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_bert, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assembly = assemble(config, dtype=dtype)
        assert assembly.step.scaler is None
        assert assembly.step.accumulate(plan_of(assembly), 0).scaling is None

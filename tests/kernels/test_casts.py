"""A weight is cast once for all its uses, and never used stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.assembly import assemble, tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtbert import kernels
from mtbert.engine.inference import infer
from mtbert.kernels.casts import WeightCasts, cast_weight
from mtbert.kernels.head_linear import head_linear
from mtbert.losses.smart import SmartConfig
from mtbert.model.bert import BertEncoder

BF16 = torch.bfloat16


class CastCount(TorchDispatchMode):
    """How often each of some parameters is copied into another dtype."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in parameters.items()}
        self.counts = dict.fromkeys(parameters, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == BF16:
            name = self.names.get(args[0].data_ptr())
            if name is not None:
                self.counts[name] += 1
        return function(*args, **kwargs)


def matrices(encoder: BertEncoder) -> dict[str, Tensor]:
    return {n: p for n, p in encoder.named_parameters() if n.startswith("layers.") and p.dim() == 2}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_step_casts_each_weight_once(tiny_bert: Path, tmp_path: Path, mode: str) -> None:
    """Though it takes several passes, and an objective runs the encoder again; frozen weights are cast but once."""
    config = tiny_config(tiny_bert, tmp_path, mode=mode, max_tokens=150)
    config.smart = SmartConfig(tasks=["sst"], projection="reference")
    assembly = assemble(config, dtype=BF16)
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    weights = {n: p for n, p in matrices(assembly.model.encoder).items() if "lora" not in n}
    with CastCount(weights) as first:
        assembly.step(plan, 0)
    assert set(first.counts.values()) == {1}, first.counts
    with CastCount(weights) as second:
        assembly.step(plan, 1)
    assert set(second.counts.values()) == {1 if mode == "full" else 0}, second.counts
    with CastCount(weights) as evaluated:
        infer(assembly.forward, assembly.data["sst"]["dev"], max_tokens=64)
    assert set(evaluated.counts.values()) == {1}


@contextmanager
def nothing_kept() -> Iterator[None]:
    yield


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_training_is_the_same_bit_for_bit_without(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Mixout and the momentum teacher change weights between their uses."""
    found = []
    for kept in (True, False):
        config = tiny_config(tiny_bert, tmp_path, mode=mode, max_tokens=150)
        if mode == "full":
            config.mixout.p = 0.3
            config.bregman.tasks = ["para"]
            config.bregman.momentum = 0.5
        assembly = assemble(config, dtype=BF16)
        if not kept:
            monkeypatch.setattr(assembly.step, "casts", nothing_kept())
        for step in range(3):
            if not kept:
                assembly.step.casts = nothing_kept()  # type: ignore[assignment]
            plan = {name: batches.batch(step) for name, batches in assembly.batches.items()}
            assembly.step(plan, step)
        outputs = infer(assembly.forward, assembly.data["sst"]["dev"], max_tokens=512)
        found.append((assembly.model.state_dict(), outputs))
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name
    assert (found[0][1] == found[1][1]).all()


def _in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def _swapped(weight: Tensor) -> None:
    weight.data = weight.data * 2.0


@pytest.mark.parametrize("change", [_in_place, _swapped])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_weight_is_cast_anew(change: Callable[[Tensor], None], frozen: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 16))
    casts = WeightCasts([weight] if frozen else [])
    with casts:
        before = cast_weight(weight, BF16)
        assert cast_weight(weight, BF16) is before
        change(weight)
        after = cast_weight(weight, BF16)
    assert after is not None
    assert torch.equal(after, weight.detach().to(BF16))
    with casts:
        assert (cast_weight(weight, BF16) is after) == frozen
    assert cast_weight(weight, BF16) is None


def test_no_cast_of_a_trained_weight_outlives_its_block() -> None:
    """The fused optimizer changes parameters without a new version."""
    weight = torch.nn.Parameter(torch.randn(8, 16))
    optimizer = torch.optim.AdamW([weight], lr=0.5, fused=True)
    casts = WeightCasts()
    with casts:
        before = cast_weight(weight, BF16)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with casts:
        after = cast_weight(weight, BF16)
    assert before is not None
    assert after is not None
    assert not torch.equal(before, after)
    assert torch.equal(after, weight.detach().to(BF16))


def test_what_needs_no_cast_has_none() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 16))
    with WeightCasts():
        assert cast_weight(weight, torch.float32) is None
        with torch.inference_mode():
            assert cast_weight(torch.randn(4, 4), BF16) is None
            made = cast_weight(weight, BF16)
        assert made is not None
        assert not made.is_inference()
        assert made is cast_weight(weight, BF16)


@pytest.mark.parametrize("operation", ["linear", "head_linear", "lora_linear"])
def test_the_gradient_goes_to_the_parameter(operation: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    if operation == "head_linear":
        x, weight = torch.randn(6, 2, 16, generator=generator).to(BF16), parameter(2, 16, 16)
    else:
        x, weight = torch.randn(6, 32, generator=generator).to(BF16), parameter(16, 32)
    a, b = parameter(4, 32), parameter(16, 4)

    def call() -> Tensor:
        if operation == "linear":
            return kernels.linear(x, weight, None)
        if operation == "head_linear":
            return head_linear(x, weight, None)
        return kernels.lora_linear(x, weight, None, a, b, scale=2.0)

    wanted = [weight] if operation != "lora_linear" else [weight, a, b]
    expected = torch.autograd.grad(call().float().square().sum(), wanted)
    with WeightCasts():
        first, second = call(), call()
    found = torch.autograd.grad((first.float() * second.float()).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other)


def test_a_cast_from_before_a_capture_stays_where_the_graph_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cast within the capture is made by its replays alone, and serves nothing else."""
    early, late = (torch.nn.Parameter(torch.randn(4, 4), requires_grad=False) for _ in range(2))
    casts = WeightCasts([early, late])
    with casts:
        before = cast_weight(early, BF16)
    monkeypatch.setattr("mtbert.kernels.casts._is_capturing", lambda _: True)
    with casts:
        assert cast_weight(early, BF16) is before
        within = cast_weight(late, BF16)
    monkeypatch.undo()
    with casts:
        assert cast_weight(early, BF16) is before
        assert cast_weight(late, BF16) is not within

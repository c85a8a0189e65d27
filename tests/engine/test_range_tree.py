"""The ranges of real training steps: their names, how they nest, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from support.assembly import Assembly, assemble, tiny_config
from support.ranges import Node, RecordedRanges
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtbert import kernels, ranges
from mtbert.kernels.dispatch import OPERATIONS, use_backend
from mtbert.losses.smart import SmartConfig
from mtbert.model.bert import BertLayer
from mtbert.optim.mixout import MixoutConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.ranges import PHASES, listening, operation, span

LAYER = (
    "query_key_value linear",
    "attention",
    "attention_output linear",
    "add_layer_norm",
    "intermediate linear",
    "bias_gelu",
    "output linear",
    "add_layer_norm",
)
LAST_LAYER = ("linear", "linear", "first_token_attention", *LAYER[2:])
"""Where every head reads first tokens."""


def step_of(assembly: Assembly, listener: RecordedRanges | None = None, step: int = 3) -> Any:
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    with ExitStack() as stack:
        if listener is not None:
            stack.enter_context(listening(listener))
            stack.enter_context(listener.modules(assembly.model))
        with span("step", step + 1):
            return assembly.step.accumulate(plan, step)


def recorded(assembly: Assembly) -> Node:
    listener = RecordedRanges()
    step_of(assembly, listener)
    assert listener.is_closed
    (step,) = listener.root.inner
    assert step.name == "step 4"
    return step


def in_order(names: list[str], *wanted: str) -> bool:
    rest = iter(names)
    return all(name in rest for name in wanted)


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda **changes: tiny_config(tiny_bert, tmp_path, **changes)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_step_is_named_down_to_the_operation(config: Callable[..., Any], backend: str) -> None:
    with use_backend(backend):
        step = recorded(assemble(config(), dtype=torch.float32))
    assert [node.name for node in step.inner] == [
        *("optimizer", "data", "data", "forward", "loss", "backward", "optimizer")
    ]
    (forward,), (backward,) = step.find("forward"), step.find("backward")
    names = forward.names()
    assert names[1:3] == ["forward embedding", "forward layer 0"]
    for number, operations in enumerate((LAYER, LAST_LAYER)):
        (layer,) = forward.find(f"forward layer {number}")
        assert in_order(layer.names(), *(f"forward layer {number} {each}" for each in operations))
    assert {"forward pooling", *(f"forward head {task}" for task in ("sst", "para", "sts"))} <= set(names)
    (loss,) = step.find("loss")
    assert [node.name for node in loss.inner] == ["loss sst", "loss para", "loss sts"]
    expected = [
        *(f"backward layer 1 {each}" for each in reversed(LAST_LAYER)),
        *(f"backward layer 0 {each}" for each in reversed(LAYER)),
    ]
    flat = backward.names()
    assert in_order(flat, "backward loss sts", "backward head sts", *expected, "backward embedding")
    assert not [name for name in flat[1:] if not name.startswith("backward ")]


def test_every_operation_of_the_kernels_is_a_range() -> None:
    listener = RecordedRanges()
    for name in OPERATIONS:
        function = getattr(kernels, name)
        with listening(listener), pytest.raises(TypeError):
            function()
        assert listener.root.inner[-1].name == f"forward {name}"
    assert listener.is_closed


def test_several_passes_repeat_the_phases_in_one_step(config: Callable[..., Any]) -> None:
    step = recorded(assemble(config(max_tokens=128)))
    phases = [node.name for node in step.inner if node.name in ("forward", "loss", "backward")]
    assert len(phases) >= 6
    assert phases == ["forward", "loss", "backward"] * (len(phases) // 3)


def test_the_passes_of_smart_are_in_its_loss(config: Callable[..., Any]) -> None:
    step = recorded(assemble(config(smart=SmartConfig(tasks=["sst"])), dtype=torch.float32))
    (smart,) = step.find("loss smart")
    assert [node.name for node in smart.inner] == ["forward", "backward", "forward"]
    inner = smart.inner[1].names()
    assert in_order(inner, "backward layer 1 first_token_attention", "backward layer 0 attention")
    # The last pass trains: its backward pass is the step's own, beside that of the first one.
    backward = step.inner[-2]
    assert backward.name == "backward"
    assert len(backward.find("backward layer 1 first_token_attention")) == 2
    assert not [name for name in step.names() if name.startswith("recompute")]


@pytest.mark.parametrize("gradients", ["one-pass", "per-task"])
def test_surgery(config: Callable[..., Any], gradients: Any) -> None:
    surgery = SurgeryConfig(method="pcgrad", gradients=gradients)
    step = recorded(assemble(config(surgery=surgery), dtype=torch.float32))
    assert len(step.find("surgery")) == 1
    (backward,) = step.find("backward")
    times = 3 if gradients == "per-task" else 1
    assert len(backward.find("backward layer 0 attention")) == times
    if times == 3:
        assert [node.name for node in backward.inner] == [
            f"backward {task}" for task in ("sst", "para", "sts")
        ]


def test_mixout_is_a_phase_of_its_own(config: Callable[..., Any]) -> None:
    step = recorded(assemble(config(mixout=MixoutConfig(p=0.5))))
    assert len(step.find("regularisation")) == 2  # before the passes, and for the gradients
    assert {node.name for node in step.inner} <= set(PHASES)


@pytest.mark.parametrize("whole_module", [True, False])
def test_a_layer_that_is_computed_again_says_so(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, whole_module: bool
) -> None:
    name = "__call__" if whole_module else "forward"
    plain = getattr(BertLayer, name)

    def again(self: BertLayer, *args: Any, **options: Any) -> Tensor:
        return checkpoint(plain, self, *args, use_reentrant=False, **options)

    monkeypatch.setattr(BertLayer, name, again)
    step = recorded(assemble(config(), dtype=torch.float32))
    (forward,), (backward,) = step.find("forward"), step.find("backward")
    assert forward.find("forward layer 1 first_token_attention")
    names = backward.names()
    assert in_order(
        names, "recompute layer 1 first_token_attention", "backward layer 1 first_token_attention"
    )
    assert in_order(names, "recompute layer 0 attention", "backward layer 0 attention")
    assert not [name for name in names if name.startswith("forward")]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ranges_are_closed_after_an_exception(config: Callable[..., Any], where: str) -> None:
    class Fault(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            if where == "forward":
                raise RuntimeError("a fault")
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("a fault")

    assembly = assemble(config())
    head = assembly.model.head("para")
    head.activation = Fault.apply  # type: ignore[assignment]
    head.hidden.append(torch.nn.Linear(32, 32, dtype=torch.float64))
    listener = RecordedRanges()
    with pytest.raises(RuntimeError, match="a fault"):
        step_of(assembly, listener)
    assert listener.is_closed
    names = listener.root.names()
    assert names[-1].startswith(f"{where} head para")
    listener.root.inner.clear()
    head.activation = torch.nn.GELU()
    step_of(assembly, listener)  # and the next step begins from nothing
    assert listener.is_closed
    assert [node.name for node in listener.root.inner] == ["step 4"]
    assert listener.root.find("forward layer 1 first_token_attention")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens": 128},
        {"mode": "lora"},
        {"mode": "last-linear-layer"},
        {"surgery": SurgeryConfig(method="pcgrad"), "smart": SmartConfig(tasks=["sts"])},
    ],
    ids=["full", "several passes", "lora", "frozen", "surgery and smart"],
)
def test_gradients_are_the_same_bit_for_bit(config: Callable[..., Any], changes: dict[str, Any]) -> None:
    found = []
    for listener in (None, RecordedRanges()):
        assembly = assemble(config(**changes), dtype=torch.float32)
        result = step_of(assembly, listener)
        gradients = {n: p.grad for n, p in assembly.model.named_parameters() if p.grad is not None}
        found.append(gradients | {"norm": result.grad_norm, "total": result.total})
    plain, listened = found
    assert plain.keys() == listened.keys()
    assert all(torch.equal(plain[name], listened[name]) for name in plain)


def test_hooks_are_gone_afterwards(config: Callable[..., Any]) -> None:
    assembly, listener = assemble(config()), RecordedRanges()
    step_of(assembly, listener)
    assert not [m for m in assembly.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    before = len(listener.root.names())
    step_of(assembly)
    assert len(listener.root.names()) == before


def test_without_a_listener_a_span_is_nothing_and_an_operation_is_called_as_it_is() -> None:
    assert span("step", 1) is span("loss", "sst") is ranges.NOTHING
    with span("data") as opened:
        opened.ends_in(torch.ones(1))

    @operation("sum")
    def add(a: int, *, b: int) -> int:
        """A sum."""
        return a + b

    assert add(1, b=2) == 3
    assert add.__doc__ == "A sum."
    with pytest.raises(TypeError, match="missing"):
        add()  # type: ignore[call-arg]


def test_listening_ends_with_its_block() -> None:
    first, second = RecordedRanges(), RecordedRanges()
    with listening(first):
        with pytest.raises(ValueError, match="a fault"), listening(second):
            raise ValueError("a fault")
        with span("data"):
            pass
    assert [first.root.names(), second.root.names()] == [["", "data"], [""]]

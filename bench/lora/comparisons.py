"""A LoRA linear beside what one would use instead: the bare frozen product, PyTorch's own operations, PEFT's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.comparison import Comparison, Goal, summarise
from bench.kernels.timing import Stopwatch, timed_side
from bench.lora import model as lora_model
from bench.measure import Alternation, Side
from mtbert import kernels
from mtbert.kernels import Dropout, dispatch, extension
from mtbert.kernels.lora_cuda import RANKS

OWN, OWN_WIDE = "mtbert", "mtbert, float32 adapters"
BARE, EAGER, COMPILED = "F.linear, frozen", "eager", "torch.compile"
PEFT, PEFT_WIDE = "peft", "peft, its default"
SCALE = 2.0
_MACHINES = {machine.name: machine for machine in lora_model.MACHINES}


@dataclass(frozen=True)
class Plan:
    """One comparison: x [tokens, inputs] through a frozen weight [outputs, inputs] with an adapter."""

    operation: ClassVar[str] = "lora_linear"
    blocks: ClassVar[int] = 1
    """Of outputs in the weight, each with an adapter."""

    tokens: int
    inputs: int
    outputs: int
    rank: int
    p: float
    device: torch.device
    dtype: torch.dtype
    backward: bool = True

    @property
    def name(self) -> str:
        """As the record calls it."""
        passes = "forward and backward" if self.backward else "forward"
        rate = f"dropout {self.p}" if self.p else "no dropout"
        return f"lora, {self.inputs}x{self.outputs}, rank {self.rank}, {rate}, {self.tokens} tokens, {passes}"

    def goals(self) -> list[Goal]:
        """Those set for an H200 in bf16 at 8,192 tokens; elsewhere the ratios are of interest, none is set."""
        bare = [1 / ratio for ratio in self._of_bare()] if self._aimed() else []
        found = [Goal(OWN, BARE, round(least, 4)) for least in bare] or [Goal(OWN, BARE)]
        peft = 2.3 if self._aimed() and self.backward and self.p else None
        others = [Goal(OWN, PEFT, peft)] + [Goal(OWN, to) for to in (PEFT_WIDE, EAGER, COMPILED)]
        return [*found, *others, Goal(OWN, OWN_WIDE)]

    def _aimed(self) -> bool:
        small = (self.inputs, self.outputs) == (384, 384)
        return self.device.type == "cuda" and self.tokens == 8192 and 8 <= self.rank <= 64 and not small

    def _of_bare(self) -> list[float]:
        """How many times as long as the bare product the adapted one may take: a goal, and one to hope for.

        With rank 8 and no dropout the forward pass is to multiply at 0.9 of the bare product's rate, where the FLOPs of
        the adapter count too.
        """
        if self.backward:
            return [1.5, 1.3] if self.p else []
        if self.p:
            return [1.4 if self.inputs == self.outputs == 768 else 1.25] if self.rank == 16 else []
        if self.rank == 8:
            return [(1 + self.rank / self.inputs + self.rank / self.outputs) / 0.9]
        return [1.15] if self.rank == 16 else []

    def predicted(self) -> float | None:
        """The model's microseconds for the extension, on a GPU that it knows."""
        if self.device.type != "cuda":
            return None
        for name, machine in _MACHINES.items():
            if name in torch.cuda.get_device_name(self.device):
                shape = lora_model.Shape(
                    self.tokens,
                    self.inputs,
                    self.blocks * self.outputs,
                    self._padded_rank(),
                    self.p > 0,
                    self.blocks,
                    self.dtype.itemsize,
                )
                seconds = lora_model.forward(machine, shape).taken(machine, shape)
                return 1e6 * (seconds + lora_model.backward(machine, shape).own * self.backward)
        return None

    def implementation(self) -> str:
        """What serves mtbert's sides. Raises ConfigError where they would not be what is to be measured."""
        with measured_kernels(self.device):
            capability = extension.capability(self.device)
            name, _ = dispatch.select(
                self.operation,
                device=self.device.type,
                dtype=self.dtype,
                capability=capability,
                rank=self.rank,
                inputs=self.inputs,
                outputs=self.blocks * self.outputs,
                frozen=True,
            )
        if name != "cuda" or capability is None:
            return name
        functions = extension.part("cuda")
        assert functions is not None
        planned = functions.lora_plan(
            architecture=10 * capability[0] + capability[1],
            rows=self.tokens,
            inputs=self.inputs,
            outputs=self.blocks * self.outputs,
            blocks=self.blocks,
            rank=self._padded_rank(),
            dtype=extension.DTYPE_NAMES[self.dtype],
            threshold=Dropout(self.p, 0, 0, 0).threshold if self.p else 0,
        )
        return f"{name}, {planned['forward']} forward and {planned['input']} for the input's gradient"

    def _padded_rank(self) -> int:
        return next(padded for padded in RANKS if padded >= self.rank)


@contextmanager
def measured_kernels(device: torch.device) -> Iterator[None]:
    """Within a `with` block, the kernels that mtbert's sides measure.

    On a GPU the extension's, asked for by name: `auto` may still prefer PyTorch's composition. Elsewhere the backend in
    force, which only shows that the harness runs.
    """
    with dispatch.use_backend("cuda" if device.type == "cuda" else dispatch.backend()):
        yield


class Inputs:
    """The tensors of a plan; every side has leaves of its own."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        generator = torch.Generator(plan.device).manual_seed(0)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=plan.device)
            return (drawn * scale).to(plan.dtype)

        outputs = plan.blocks * plan.outputs
        self.x = random(plan.tokens, plan.inputs)
        self.weight = random(outputs, plan.inputs, scale=plan.inputs**-0.5)
        self.bias = random(outputs)
        self.adapters = [
            (
                random(plan.rank, plan.inputs, scale=plan.inputs**-0.5),
                random(plan.outputs, plan.rank, scale=0.1),
            )
            for _ in range(plan.blocks)
        ]
        self.gradient = random(plan.tokens, outputs)
        self.rows = torch.arange(plan.tokens, dtype=torch.int32, device=plan.device)

    def leaf(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A copy that takes a gradient."""
        return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()

    def adapter_leaves(self, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
        """Copies of the adapters that take gradients."""
        return [(self.leaf(a, dtype), self.leaf(b, dtype)) for a, b in self.adapters]

    @property
    def dropout(self) -> Dropout | None:
        """That of mtbert's sides."""
        return Dropout(self.plan.p, 2**40 + 5, 7, 1) if self.plan.p else None

    def passes(
        self, forward: Callable[[], Tensor | list[Tensor]], leaves: Sequence[Tensor]
    ) -> Callable[[], object]:
        """Forward and the gradients of the leaves, or forward alone without anything kept for them.

        forward: the result, or its blocks of columns, which are given their parts of its gradient.
        """
        if not self.plan.backward:
            return torch.no_grad()(forward)

        def both() -> object:
            result = forward()
            whole = isinstance(result, Tensor)
            return torch.autograd.grad(
                result, leaves, self.gradient if whole else self.gradient.chunk(len(result), 1)
            )

        return both


def own(t: Inputs, dtype: torch.dtype | None = None) -> Callable[[], object]:
    """The public operation by the kernels that are measured; adapters in `dtype`, else in that of x."""
    x, ((a, b),) = t.leaf(t.x), t.adapter_leaves(dtype)

    def forward() -> Tensor:
        with measured_kernels(t.plan.device):
            return kernels.lora_linear(
                x, t.weight, t.bias, a, b, scale=SCALE, dropout_row=t.rows, dropout=t.dropout
            )

    return t.passes(forward, [x, a, b])


def bare(t: Inputs) -> Callable[[], object]:
    """The frozen product, and the gradient of its input."""
    x = t.leaf(t.x)
    return t.passes(lambda: F.linear(x, t.weight, t.bias), [x])


def _compose(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
    return F.linear(x, weight, bias) + SCALE * F.linear(F.linear(F.dropout(x, p), a), b)


def composed(t: Inputs, *, compiled: bool = False) -> Callable[[], object]:
    """As the formula reads."""
    x, ((a, b),) = t.leaf(t.x), t.adapter_leaves()
    # A function of this side's own: with one for all, torch would compile for sizes that vary.
    run = torch.compile(lambda *given: _compose(*given), dynamic=False) if compiled else _compose
    return t.passes(lambda: run(x, t.weight, t.bias, a, b, t.plan.p), [x, a, b])


def peft(t: Inputs, *, wide: bool) -> Callable[[], object]:
    """PEFT's layer. wide: with adapters in float32, as it makes them from half-width models."""
    (layer,), leaves = peft_layers(t, wide=wide)
    x = t.leaf(t.x)
    return t.passes(lambda: layer(x), [x, *leaves])


def peft_layers(t: Inputs, *, wide: bool) -> tuple[list[Any], list[Tensor]]:
    """A layer of PEFT's for each block of outputs, in training, and their A and B."""
    from peft import LoraConfig, get_peft_model

    plan = t.plan
    names = [f"linear{block}" for block in range(plan.blocks)]
    linears = nn.ModuleDict(
        {name: nn.Linear(plan.inputs, plan.outputs, device=plan.device, dtype=plan.dtype) for name in names}
    )
    config = LoraConfig(r=plan.rank, lora_alpha=SCALE * plan.rank, lora_dropout=plan.p, target_modules=names)
    model: Any = get_peft_model(linears, config, autocast_adapter_dtype=wide).base_model.model  # type: ignore[arg-type]
    layers = [model[name].train() for name in names]
    leaves: list[Tensor] = []
    blocks = zip(layers, t.weight.chunk(plan.blocks), t.bias.chunk(plan.blocks), t.adapters, strict=True)
    with torch.no_grad():
        for layer, weight, bias, pair in blocks:
            layer.base_layer.weight.copy_(weight)
            layer.base_layer.bias.copy_(bias)
            for module, value in zip((layer.lora_A, layer.lora_B), pair, strict=True):
                module["default"].weight.copy_(value)
                leaves.append(module["default"].weight)
    return layers, leaves


BUILDERS: dict[str, Callable[[Inputs], Callable[[], object]]] = {
    OWN: own,
    OWN_WIDE: lambda t: own(t, torch.float32),
    BARE: bare,
    EAGER: composed,
    COMPILED: lambda t: composed(t, compiled=True),
    PEFT: lambda t: peft(t, wide=False),
    PEFT_WIDE: lambda t: peft(t, wide=True),
}


def compare(
    plan: Plan,
    stopwatch: Stopwatch,
    measure: Callable[[Alternation], None],
    *,
    builders: Mapping[str, Callable[[Inputs], Callable[[], object]]] = BUILDERS,
    without: Sequence[str] = (),
) -> Comparison:
    """All sides but those left out; the unit is tokens a second. `measure` runs the rounds.

    A peer that cannot be built is left out and named, one of mtbert's or the bare product is an error.

    Of mtbert's side the model's prediction is recorded beside the microseconds, and what served it.
    """
    implementation = plan.implementation()
    inputs = Inputs(plan)
    sides: list[Side] = []
    left_out: list[str] = []
    for name, build in builders.items():
        if name in without:
            continue
        try:
            sides.append(timed_side(name, build(inputs), stopwatch, plan.tokens))
        except Exception as error:  # a peer that is not installed, or refuses in whatever way
            if name == BARE or name.startswith(OWN):
                raise
            left_out.append(f"{name} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})")
    predicted = plan.predicted()
    if predicted is not None:
        sides[0].figures["predicted_microseconds"] = predicted
    alternation = Alternation(sides, clock=stopwatch)
    measure(alternation)
    return summarise(
        plan.name,
        alternation,
        baseline=BARE,
        goals=plan.goals(),
        left_out=left_out,
        implementations={side.name: implementation for side in sides if side.name in (OWN, OWN_WIDE)},
    )

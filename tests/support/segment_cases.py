"""Every operation that takes segments, on small inputs, with and without them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from support.kernel_checks import DROPOUT
from torch import Tensor

from mtbert import kernels
from mtbert.kernels import Segments, dispatch
from mtbert.kernels.segments import companion

TOKENS = 131
WORDS = 23
IMPLEMENTATIONS = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("auto", torch.float64),  # products with their own autograd, the rest by the reference
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
]
Gradients = dict[str, Tensor | None]
Call = Callable[[dict[str, Any], torch.dtype, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation; activations are cast to the dtype under test, parameters are float32 (float64 under float64)."""

    name: str
    activations: dict[str, Tensor]
    parameters: dict[str, Tensor]
    call: Call
    width: int
    slots: Tensor | None = None

    def leaves(self, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations and parameters, all trained."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        activations = {n: a.to(dtype, copy=True).requires_grad_() for n, a in self.activations.items()}
        return activations, {n: p.to(wide, copy=True).requires_grad_() for n, p in self.parameters.items()}

    def upstream(self, dtype: torch.dtype, seed: int = 1) -> Tensor:
        """A gradient of the output."""
        return random(TOKENS, self.width, seed=seed).to(dtype)

    def segments(
        self, bounds: tuple[int, ...], parameters: dict[str, Tensor], named: Collection[str]
    ) -> Segments:
        """Segments with companions of the named parameters."""
        groups = len(bounds) - 1
        companions = {}
        for name in named:
            companions[parameters[name]] = companion(parameters[name], groups)
            if name == "word" and self.slots is not None:
                in_use = int(self.slots.max()) + 1
                companions[parameters[name]] = companion(parameters[name][:in_use].detach(), groups)
        return Segments(bounds, companions, self.slots)

    def run(self, backend: str, dtype: torch.dtype, upstream: Tensor) -> Gradients:
        """The output and every gradient of one ordinary pass."""
        activations, parameters = self.leaves(dtype)
        with dispatch.use_backend(backend):
            output = self.call(activations | parameters, dtype, {})
            output.backward(upstream)
        return {"output": output.detach()} | {n: t.grad for n, t in (activations | parameters).items()}

    def run_grouped(
        self,
        backend: str,
        dtype: torch.dtype,
        upstream: Tensor,
        bounds: tuple[int, ...],
        named: Collection[str] | None = None,
    ) -> Gradients:
        """As `run`, in one pass with segments: the gradients of named parameters are those of their companions."""
        activations, parameters = self.leaves(dtype)
        named = parameters if named is None else named
        segments = self.segments(bounds, parameters, named)
        with dispatch.use_backend(backend):
            output = self.call(activations | parameters, dtype, {"segments": segments})
            output.backward(upstream)
        found: Gradients = {"output": output.detach()}
        found |= {n: t.grad for n, t in (activations | parameters).items() if n not in named}
        for name in named:
            assert parameters[name].grad is None, f"{name} has a gradient beside its companion's"
            gradient = segments.companions[parameters[name]].grad
            assert gradient is not None, f"the companion of {name} has no gradient"
            assert gradient.is_contiguous()
            assert gradient.dtype == parameters[name].dtype
            found[name] = self.dense(gradient) if name == "word" else gradient
        return found

    def dense(self, gradient: Tensor) -> Tensor:
        """A gradient of the word table by slot [K, U, C] as one by word."""
        if self.slots is None:
            return gradient
        word_of_slot = torch.empty(gradient.shape[1], dtype=torch.int64)
        word_of_slot[self.slots.long()] = IDS.long()
        return gradient.new_zeros(len(gradient), WORDS, gradient.shape[2]).index_copy(
            1, word_of_slot, gradient
        )

    def separately(
        self, backend: str, dtype: torch.dtype, upstream: Tensor, bounds: tuple[int, ...]
    ) -> Gradients:
        """What `run_grouped` is to give: a pass for each group, with the upstream gradient of the others zeroed."""
        found = self.run(backend, dtype, upstream)
        passes = []
        for low, high in pairwise(bounds):
            own = torch.zeros_like(upstream)
            own[low:high] = upstream[low:high]
            passes.append(self.run(backend, dtype, own))
        for name in self.parameters:
            found[name] = torch.stack([p[name] for p in passes])  # type: ignore[misc]
        return found


def random(*shape: int, seed: int) -> Tensor:
    """Normal numbers that bfloat16 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


MASK: dict[str, Any] = {"dropout_row": torch.arange(TOKENS, dtype=torch.int32) * 7, "dropout": DROPOUT}
X = random(TOKENS, 24, seed=10)
IDS = torch.randint(WORDS, (TOKENS,), generator=torch.Generator().manual_seed(11), dtype=torch.int32)
IDS[:3] = torch.tensor([4, 4, 21])
POSITIONS = torch.arange(TOKENS, dtype=torch.int32) % 40
TYPES = torch.arange(TOKENS, dtype=torch.int32) // 3 % 2
# Slots in the order of appearance, not of the words.
SLOTS = torch.tensor([list(dict.fromkeys(IDS.tolist())).index(i) for i in IDS.tolist()], dtype=torch.int32)


def _parameters(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: random(*shape, seed=20 + i) for i, (name, shape) in enumerate(shapes.items())}


def _embedding(t: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    tables = (t["word"], t["position"], t["token_type"])
    return kernels.embedding(
        IDS, TYPES, POSITIONS, tables, t["weight"], t["bias"], eps=1e-6, dtype=dtype, **MASK, **options
    )


def _add_layer_norm(t: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    return kernels.add_layer_norm(**t, eps=1e-6, **MASK, **options)


def _lora_qkv(t: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]) -> Tensor:
    adapters = ((t["query_a"], t["query_b"]), None, (t["value_a"], t["value_b"]))
    return kernels.lora_qkv(t["x"], t["weight"], t["bias"], adapters, scale=0.5, **MASK, **options)


_TABLES = _parameters(word=(WORDS, 24), position=(40, 24), token_type=(2, 24), weight=(24,), bias=(24,))
_LORA = _parameters(weight=(20, 24), bias=(20,), lora_a=(4, 24), lora_b=(20, 4))
_QKV = _parameters(
    weight=(60, 24), bias=(60,), query_a=(2, 24), query_b=(20, 2), value_a=(3, 24), value_b=(20, 3)
)

CASES = [
    Case(
        "linear",
        {"x": X},
        _parameters(weight=(20, 24), bias=(20,)),
        lambda t, _, options: kernels.linear(**t, **options),
        20,
    ),
    Case(
        "linear without bias",
        {"x": X},
        _parameters(weight=(20, 24)),
        lambda t, _, options: kernels.linear(**t, bias=None, **options),
        20,
    ),
    Case(
        "lora_linear",
        {"x": X},
        _LORA,
        lambda t, _, options: kernels.lora_linear(**t, scale=0.7, **MASK, **options),
        20,
    ),
    Case("lora_qkv", {"x": X}, _QKV, _lora_qkv, 60),
    Case(
        "add_layer_norm",
        {"x": X, "residual": random(TOKENS, 24, seed=12)},
        _parameters(weight=(24,), bias=(24,), linear_bias=(24,)),
        _add_layer_norm,
        24,
    ),
    Case(
        "bias_gelu",
        {"x": X},
        _parameters(bias=(24,)),
        lambda t, _, options: kernels.bias_gelu(**t, **options),
        24,
    ),
    Case("embedding", {}, _TABLES, _embedding, 24),
    Case("embedding by slot", {}, _TABLES, _embedding, 24, SLOTS),
]

"""Is each kernel right on this machine? Small runs, forward and backward, against the reference.

The rule is that of the tests: an error against float64 with the same dropout mask of at most twice the error
of plain PyTorch in the same type, plus one rounding of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mtbert import kernels
from mtbert.kernels import Dropout, dispatch, reference

_LENGTHS = (1, 15, 16, 17, 40)
_HEADS, _HEAD_DIM = 2, 32
_WIDTH, _INNER, _RANK, _VOCABULARY = 64, 96, 4, 30
_EPS = 1e-12
_DROPOUT = Dropout(p=0.1, seed=0x0123456789ABCDEF, step=7, site=3)

Call = Callable[[ModuleType, dict[str, Tensor], torch.dtype], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation and its inputs in float32; activations are cast to the type under test."""

    operation: str
    activations: dict[str, Tensor]
    parameters: dict[str, Tensor]
    call: Call
    constants: tuple[str, ...] = ()
    """Parameters that CUDA takes as constants."""


@dataclass(frozen=True)
class Parity:
    """How far an implementation is from the truth; `worst`: the largest error, as a share of the allowed."""

    operation: str
    implementation: str
    device: str
    dtype: str
    worst: float
    problem: str

    @property
    def ok(self) -> bool:
        """Whether every output and every gradient is within the rule."""
        return not self.problem and self.worst <= 1.0


def check_all(devices: list[str]) -> Iterator[Parity]:
    """Run every implementation that serves a device, in float32 and bfloat16, except the reference itself."""
    for device in devices:
        cases = {case.operation: case for case in _cases(device)}
        for row in dispatch.TABLE:
            if row.implementation == "reference":
                continue
            for dtype in (torch.float32, torch.bfloat16):
                facts = {"device": device, "dtype": dtype, "head_dim": _HEAD_DIM, "max_seqlen": 64}
                if all(condition.holds(facts) for condition in row.conditions):
                    yield _check(cases[row.operation], row, facts)


def _backend(row: dispatch.Row, facts: dict[str, Any]) -> str:
    """The choice that leads to this implementation: `auto` where it does, as it serves inner calls too."""
    with dispatch.use_backend("auto"):
        implementation, _ = dispatch.select(row.operation, **facts)
    return "auto" if implementation == row.implementation else row.backends[0]


def _check(case: Case, row: dispatch.Row, facts: dict[str, Any]) -> Parity:
    device, dtype = facts["device"], facts["dtype"]
    name = str(dtype).removeprefix("torch.")
    frozen = case.constants if row.implementation == "cuda" else ()
    try:
        with dispatch.use_backend(_backend(row, facts)):
            found = _run(kernels, case, dtype, torch.float32, frozen)
    except Exception as error:
        # A kernel that raises anything at all is what the caller wants to know of.
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        return Parity(case.operation, row.implementation, device, name, float("inf"), problem)
    plain = _run(reference, case, dtype, torch.float32, frozen)
    exact = _run(reference, case, dtype, torch.float64, frozen)
    worst, where = 0.0, ""
    for tensor, truth in exact.items():
        allowed = 2 * _distance(plain[tensor], truth) + torch.finfo(dtype).eps * truth.abs().max().item()
        share = _distance(found[tensor], truth) / allowed
        # Written so that NaN counts as worse.
        if not share <= worst:
            worst, where = share, tensor
    problem = "" if worst <= 1.0 else f"{where} is off by {worst:.3g} times what is allowed"
    return Parity(case.operation, row.implementation, device, name, worst, problem)


def _distance(found: Tensor, truth: Tensor) -> float:
    return (found - truth).abs().max().item()


def _run(
    module: ModuleType, case: Case, dtype: torch.dtype, wide: torch.dtype, frozen: tuple[str, ...]
) -> dict[str, Tensor]:
    """The output and the gradient of every input that is not frozen, in float64; wide float64 computes all in it."""
    compute = torch.float64 if wide == torch.float64 else dtype
    inputs = {name: tensor.detach().to(dtype).to(compute) for name, tensor in case.activations.items()}
    inputs |= {name: tensor.detach().to(wide) for name, tensor in case.parameters.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items() if name not in frozen}
    output = case.call(module, inputs, compute)
    cotangent = (
        _random(torch.Generator().manual_seed(1), *output.shape).to(output.device, dtype).to(output.dtype)
    )
    gradients = torch.autograd.grad(output, list(leaves.values()), cotangent)
    named = zip(("output", *(f"gradient of {name}" for name in leaves)), (output, *gradients), strict=True)
    return {name: tensor.detach().double() for name, tensor in named}


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _cases(device: str) -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return _random(generator, *shape).to(device)

    def whole(high: int) -> Tensor:
        return torch.randint(high, (tokens,), generator=generator, dtype=torch.int32).to(device)

    tokens = sum(_LENGTHS)
    rows = [number * 4096 + place for number, length in enumerate(_LENGTHS) for place in range(length)]
    ends = torch.tensor((0, *_LENGTHS)).cumsum(0)
    cu_seqlens = ends.to(device, torch.int32)
    mask: dict[str, Any] = {
        "dropout_row": torch.tensor(rows, dtype=torch.int32, device=device),
        "dropout": _DROPOUT,
    }
    lengths = whole(_WIDTH + 1)
    ids, types = whole(_VOCABULARY), whole(2)
    positions = torch.tensor([row % 4096 for row in rows], dtype=torch.int32, device=device)
    x, weight, bias = random(tokens, _WIDTH), random(_INNER, _WIDTH) / 8, random(_INNER)
    adapter = {"lora_a": random(_RANK, _WIDTH) / 8, "lora_b": random(_INNER, _RANK)}
    norm = {"weight": random(_WIDTH), "bias": random(_WIDTH)}
    scale = _HEAD_DIM**-0.5
    frozen = ("weight", "bias")

    def embedding(module: ModuleType, t: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        tables = (t["word"], t["position"], t["token_type"])
        return module.embedding(
            ids, types, positions, tables, t["weight"], t["bias"], eps=_EPS, dtype=dtype, **mask
        )

    def first_token_attention(module: ModuleType, t: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        first = mask | {"dropout_row": mask["dropout_row"][cu_seqlens[:-1]].contiguous()}
        return module.first_token_attention(t["query"], t["key_value"], cu_seqlens, 64, scale=scale, **first)

    def add_layer_norm(module: ModuleType, t: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        return module.add_layer_norm(
            t["x"], t["residual"], t["weight"], t["bias"], linear_bias=t["linear_bias"], eps=_EPS, **mask
        )

    def lora_linear(module: ModuleType, t: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        adapted = (t["lora_a"], t["lora_b"])
        return module.lora_linear(t["x"], t["weight"], t["bias"], *adapted, scale=2.0, **mask)

    def lora_qkv(module: ModuleType, t: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        adapters = ((t["query_a"], t["query_b"]), None, (t["value_a"], t["value_b"]))
        return module.lora_qkv(t["x"], t["weight"], t["bias"], adapters, scale=2.0, **mask)

    return [
        Case("dropout", {"x": x}, {}, lambda module, t, _: module.dropout(t["x"], *mask.values())),
        Case(
            "attention",
            {"qkv": random(tokens, 3, _HEADS, _HEAD_DIM)},
            {},
            lambda module, t, _: module.attention(t["qkv"], cu_seqlens, 64, scale=scale, **mask),
        ),
        Case(
            "first_token_attention",
            {
                "query": random(len(_LENGTHS), _HEADS, _HEAD_DIM),
                "key_value": random(tokens, 2, _HEADS, _HEAD_DIM),
            },
            {},
            first_token_attention,
        ),
        Case(
            "embedding",
            {},
            {
                "word": random(_VOCABULARY, _WIDTH),
                "position": random(64, _WIDTH),
                "token_type": random(2, _WIDTH),
                **norm,
            },
            embedding,
        ),
        Case(
            "add_layer_norm",
            {"x": x, "residual": random(tokens, _WIDTH)},
            {**norm, "linear_bias": random(_WIDTH)},
            add_layer_norm,
        ),
        Case(
            "bias_gelu",
            {"x": random(tokens, _INNER)},
            {"bias": bias},
            lambda module, t, _: module.bias_gelu(t["x"], t["bias"]),
        ),
        Case(
            "linear",
            {"x": x},
            {"weight": weight, "bias": bias},
            lambda module, t, _: module.linear(t["x"], t["weight"], t["bias"]),
        ),
        Case(
            "head_linear",
            {"x": random(tokens, _HEADS, _HEAD_DIM)},
            {"weight": random(_HEADS, 16, _HEAD_DIM) / 8, "bias": random(_HEADS * 16)},
            lambda module, t, _: module.head_linear(t["x"], t["weight"], t["bias"]),
        ),
        Case(
            "softmax",
            {"x": x},
            {},
            lambda module, t, _: module.softmax(t["x"], lengths=lengths, **mask),
        ),
        Case("lora_linear", {"x": x}, {"weight": weight, "bias": bias, **adapter}, lora_linear, frozen),
        Case(
            "lora_qkv",
            {"x": x},
            {
                "weight": random(3 * _WIDTH, _WIDTH) / 8,
                "bias": random(3 * _WIDTH),
                **{f"{name}_a": random(_RANK, _WIDTH) / 8 for name in ("query", "value")},
                **{f"{name}_b": random(_WIDTH, _RANK) for name in ("query", "value")},
            },
            lora_qkv,
            frozen,
        ),
    ]

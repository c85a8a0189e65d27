"""Which implementation serves a call: a table as data, read from the top for each operation.

Nothing here reads a value on a device: device type, dtype and shapes alone decide. `set_backend` or the environment
variable MTBERT_KERNELS chooses: `auto` takes the first row that serves, a name takes that implementation or raises.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mtbert.errors import ConfigError

from . import extension

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ENVIRONMENT = "MTBERT_KERNELS"

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """Something an implementation needs: a predicate on the facts of a call, and what to say where it fails."""

    holds: Callable[[Facts], bool]
    otherwise: str


@dataclass(frozen=True)
class Row:
    """One implementation of one operation; `backends` are the explicit choices that it answers to."""

    operation: str
    implementation: str
    backends: tuple[str, ...]
    conditions: tuple[Condition, ...]
    reason: str


def _device(name: str) -> Condition:
    return Condition(lambda facts: facts["device"] == name, f"the tensors must be on a {name} device")


def _dtype(*dtypes: torch.dtype) -> Condition:
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return Condition(lambda facts: facts["dtype"] in dtypes, f"the dtype must be {names}")


def _built(part: str, function: str) -> Condition:
    return Condition(
        lambda _: hasattr(extension.part(part), function),
        extension.problem or f"the extension mtbert._C was built without {part}.{function}",
    )


def _cpu(operation: str, function: str, *more: Condition) -> Row:
    conditions = (_device("cpu"), _dtype(torch.float32, torch.bfloat16), _built("cpu", function), *more)
    return Row(operation, "cpu", ("cpu",), conditions, "C++ for host memory")


def triton_interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, on tensors in host memory (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def _triton_version() -> tuple[int, ...]:
    """Empty where Triton is not installed. Read from the package's record: importing Triton takes a second."""
    for package in ("triton", "pytorch-triton"):  # the latter comes with PyTorch's nightly builds
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    return ()


_TRITON_VERSION = _triton_version()
_TRITON_INSTALLED = Condition(
    lambda _: _TRITON_VERSION >= (3, 4), "the package triton must be installed, version 3.4 or newer"
)
# The interpreter is a thousand times slower than anything else: only whoever asks for Triton by name gets it.
_TRITON_DEVICE = Condition(
    lambda facts: (
        facts["device"] == "cuda"
        or (facts["device"] == "cpu" and backend() == "triton" and triton_interpreted())
    ),
    "the tensors must be on a cuda device (or on a cpu, with kernels=triton and TRITON_INTERPRET=1)",
)


@torch.compiler.assume_constant_result  # dynamo asks once, and does not trace the question
def _capability() -> tuple[int, int]:
    """Of the current GPU; on a machine without one the interpreter serves, which has all there is."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)


_TRITON_CAPABILITY = Condition(
    lambda facts: facts["device"] != "cuda" or _capability() >= (8, 0),
    "the GPU must be of compute capability 8.0 or newer",
)


def _triton(operation: str, *more: Condition) -> Row:
    # What the extension has no CUDA code for is Triton's under `cuda` too: else no model could run under it.
    backends = ("triton",) if operation == "dropout" else ("triton", "cuda")
    floats = _dtype(torch.float32, torch.bfloat16, torch.float16)
    conditions = (_TRITON_DEVICE, floats, _TRITON_INSTALLED, _TRITON_CAPABILITY, *more)
    return Row(operation, "triton", backends, conditions, "Triton")


def _reference(operation: str, *more: str) -> Row:
    """more: backends that have nothing of their own for the operation, and are answered to as well."""
    reason = "plain PyTorch serves every device and dtype"
    return Row(operation, "reference", ("reference", *more), (), reason)


def _products(operation: str) -> Row:
    reason = "matrix products are PyTorch's under every backend"
    return Row(operation, "torch", ("cpu", "triton", "cuda"), (), reason)


def _products_beside_cuda(operation: str) -> Row:
    reason = "PyTorch's matrix products"
    return Row(operation, "torch", ("cpu", "triton"), (), reason)


def _products_cpu(operation: str) -> Row:
    conditions = (_device("cpu"), _dtype(torch.float32, torch.bfloat16), _built("cpu", "column_sums"))
    return Row(
        operation, "cpu", ("cpu",), conditions, "PyTorch's matrix products, C++ for the sums around them"
    )


_HEAD_DIM = Condition(
    lambda facts: facts.get("head_dim", 64) % 16 == 0 and facts.get("head_dim", 64) <= 128,
    "the head dimension must be a multiple of 16 up to 128",
)
_TRITON_HEAD_DIM = Condition(
    lambda facts: facts.get("head_dim", 64) in (16, 32, 64, 128),
    "the head dimension must be 16, 32, 64 or 128",
)
_ROW_LENGTH = Condition(
    lambda facts: facts.get("max_seqlen", 512) <= 4096, "rows may be at most 4096 tokens long (max_seqlen)"
)

_TABLE_DTYPE = Condition(
    lambda facts: facts.get("table_dtype", torch.float32) in (torch.float32, torch.bfloat16),
    "the tables' dtype must be float32 or bfloat16",
)

_TRITON_WIDTH = Condition(
    lambda facts: 1 <= facts.get("width", 768) <= 8192, "rows must be 1 to 8192 columns wide"
)
_FEW_TYPES = Condition(
    lambda facts: facts.get("types", 2) <= 8, "the token_type table must have at most 8 rows"
)

# An emulation of the extension serves tensors in host memory, but only whoever asks for CUDA by name.
_CUDA_DEVICE = Condition(
    lambda facts: (
        facts["device"] == "cuda"
        or (facts["device"] == "cpu" and backend() == "cuda" and extension.cuda_is_emulated())
    ),
    "the tensors must be on a cuda device",
)


def _has_code(facts: Facts) -> bool:
    gpu = facts.get("capability") or extension.capability(torch.device(facts["device"]))
    return gpu is None or (gpu >= (8, 0) and extension.has_code_for(gpu))


_CUDA_CODE = Condition(
    _has_code, "the GPU must have compute capability 8.0 or higher, and the extension must be built for it"
)
_TF32 = Condition(
    lambda facts: facts["dtype"] != torch.float32 or extension.tf32_is_allowed(),
    "float32 is multiplied as TF32, which torch.backends.cuda.matmul.fp32_precision = 'tf32' must allow",
)
_ADAPTED = Condition(lambda facts: facts.get("rank", 8) > 0, "there must be an adapter, of rank 1 or more")
_LORA_RANK = Condition(lambda facts: facts.get("rank", 8) <= 64, "the rank must be 1 to 64")
_LORA_SIZES = Condition(
    lambda facts: all(
        size > 0 and size % 8 == 0 for size in (facts.get("inputs", 768), facts.get("outputs", 768))
    ),
    "the weight's rows and columns must be multiples of 8",
)
_FROZEN = Condition(lambda facts: facts.get("frozen", True), "weight and bias must be frozen")


# It stands behind PyTorch's products in the table, so `auto` never takes it. Whoever has shown on a GPU that it is
# right and faster moves this row before theirs, by hand.
def _lora_cuda(operation: str) -> Row:
    floats = _dtype(torch.float32, torch.bfloat16, torch.float16)
    built = _built("cuda", "lora_forward")
    conditions = (_CUDA_DEVICE, floats, built, _CUDA_CODE, _TF32, _ADAPTED, _LORA_RANK, _LORA_SIZES, _FROZEN)
    return Row(operation, "cuda", ("cuda",), conditions, "CUDA C++, the adapter within the product")


TABLE: tuple[Row, ...] = (
    _cpu("dropout", "dropout"),
    _triton("dropout"),
    Row(
        "dropout",
        "cuda",
        ("cuda",),
        (_device("cuda"), _dtype(torch.float32, torch.bfloat16, torch.float16), _built("cuda", "dropout")),
        "CUDA C++",
    ),
    _reference("dropout"),
    _cpu("attention", "attention_forward", _HEAD_DIM, _ROW_LENGTH),
    _triton("attention", _TRITON_HEAD_DIM, _ROW_LENGTH),
    _reference("attention"),
    _cpu("first_token_attention", "first_token_attention_forward", _HEAD_DIM, _ROW_LENGTH),
    _triton("first_token_attention", _TRITON_HEAD_DIM, _ROW_LENGTH),
    _reference("first_token_attention"),
    _triton("softmax"),
    _reference("softmax", "cpu"),
    _cpu("embedding", "embedding_forward", _TABLE_DTYPE),
    _triton("embedding", _TRITON_WIDTH, _TABLE_DTYPE, _FEW_TYPES),
    _reference("embedding"),
    _cpu("add_layer_norm", "add_layer_norm_forward"),
    _triton("add_layer_norm", _TRITON_WIDTH),
    _reference("add_layer_norm"),
    _cpu("bias_gelu", "bias_gelu_forward"),
    _triton("bias_gelu"),
    _reference("bias_gelu"),
    _products_cpu("linear"),
    _products("linear"),
    _reference("linear"),
    _products_cpu("head_linear"),
    _products("head_linear"),
    _reference("head_linear"),
    _products_cpu("lora_linear"),
    _products_beside_cuda("lora_linear"),
    _lora_cuda("lora_linear"),
    _reference("lora_linear"),
    _products_cpu("lora_qkv"),
    _products_beside_cuda("lora_qkv"),
    _lora_cuda("lora_qkv"),
    _reference("lora_qkv"),
)
OPERATIONS = tuple(dict.fromkeys(row.operation for row in TABLE))

_backend: str | None = None


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ConfigError(f"{source}: {name!r} is no kernel backend, expected one of {', '.join(BACKENDS)}")
    return name


def backend() -> str:
    """The backend in force: what `set_backend` was given, else MTBERT_KERNELS, else auto."""
    if _backend is not None:
        return _backend
    return _checked(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)


def set_backend(name: str | None) -> None:
    """Choose the backend for all later calls; None leaves the choice to the environment again."""
    global _backend
    _backend = None if name is None else _checked(name, "kernels")


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose the backend within a `with` block, as `set_backend` does."""
    global _backend
    before = _backend
    try:
        set_backend(name)
        yield
    finally:
        _backend = before


def _failures(row: Row, facts: Facts) -> list[str]:
    return [condition.otherwise for condition in row.conditions if not condition.holds(facts)]


def select(operation: str, *, device: str, dtype: torch.dtype, **shape: Any) -> tuple[str, str]:
    """The implementation that serves a call, and why it does.

    device: a device type such as `cpu`; shape: what the table asks about (head_dim, max_seqlen,
    table_dtype, width, types, rank, inputs, outputs, frozen, and capability, that of the GPU).
    Raises ConfigError where the backend was chosen by name and cannot serve the call.
    """
    if operation not in OPERATIONS:
        raise ValueError(
            f"dispatch: unknown operation {operation!r}, expected one of {', '.join(OPERATIONS)}"
        )
    implementation, reason = _choose(operation, {"device": device, "dtype": dtype, **shape})
    if implementation is None:
        raise ConfigError(_unserved([operation], device, dtype, reason))
    return implementation, reason


def _choose(operation: str, facts: Facts) -> tuple[str | None, str]:
    """The implementation that serves, and why; or None, and why none does."""
    chosen = backend()
    rows = [
        row for row in TABLE if row.operation == operation and (chosen == "auto" or chosen in row.backends)
    ]
    problems: list[str] = []
    for row in rows:
        failures = _failures(row, facts)
        if not failures:
            return row.implementation, "; ".join([row.reason, *problems])
        problems.append(f"not {row.implementation}: {', '.join(failures)}")
    return None, "; ".join(problems) or f"there is no {chosen} implementation"


def _unserved(operations: Sequence[str], device: str, dtype: torch.dtype, reason: str) -> str:
    name = str(dtype).removeprefix("torch.")
    return f"kernels={backend()} cannot serve {', '.join(operations)} for {name} on {device}: {reason}"


@dataclass(frozen=True)
class Explanation:
    """Which implementation would serve an operation (None: none can under the chosen backend), and why."""

    operation: str
    implementation: str | None
    reason: str


def explain(device: str, dtype: torch.dtype) -> list[Explanation]:
    """One explanation for each operation, at ordinary shapes, under the backend in force."""
    facts = {"device": device, "dtype": dtype}
    return [Explanation(operation, *_choose(operation, facts)) for operation in OPERATIONS]


def serving(device: str, dtype: torch.dtype) -> dict[str, str]:
    """The implementation of every operation, at ordinary shapes, under the backend in force.

    Raises ConfigError where there is none, with one line for each reason, which names all operations it holds for.
    """
    served: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    for found in explain(device, dtype):
        if found.implementation is None:
            missing.setdefault(found.reason, []).append(found.operation)
        else:
            served[found.operation] = found.implementation
    if missing:
        raise ConfigError("\n".join(_unserved(names, device, dtype, why) for why, names in missing.items()))
    return served

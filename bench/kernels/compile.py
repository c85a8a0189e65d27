"""What a recorded launch of a Triton kernel compiles to, without a GPU: registers, spilled bytes, shared memory.

Triton itself derives everything that depends on a launch's arguments (which are constants, which are known to be
divisible by 16): its JIT runs under a driver that has no device and only names an architecture. What is compiled is
what a launch on such a device would compile, in every version of Triton. The driver stays: use this in a process that
launches nothing itself, and without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as drivers

from mtbert.kernels.triton_ops.launch import Launch

_ALIGNED, _UNALIGNED = 0, 4

_VERSION = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
TOLERATED_SPILL = 0 if _VERSION >= (3, 9) else 160
"""Bytes a thread. The tiles are chosen with Triton 3.9, which spills nothing; the compilers of 3.4 and 3.6 spill up to
so much in a few of the attention kernels, less than other tiles would cost."""


@dataclass(frozen=True)
class Architecture:
    """A generation of NVIDIA GPUs: what a multiprocessor has for the programs that run on it at the same time."""

    number: int
    """90: compiled for sm_90."""
    shared_of_program: int
    """The most shared memory that one program can have, bytes."""
    shared: int
    warps: int = 64
    programs: int = 32
    registers: int = 65536

    @property
    def name(self) -> str:
        """As the compiler writes it."""
        return f"sm_{self.number}"

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """The share of a multiprocessor's warps that programs of this kind can hold at the same time.

        Registers are given to a warp in blocks of 256; every program takes 1 KiB of shared memory on top of its own.
        0: not even one program fits.
        """
        registers_of_warp = -(-max(registers, 1) * 32 // 256) * 256
        if shared > self.shared_of_program or registers_of_warp * warps > self.registers:
            return 0.0
        programs = min(
            self.programs,
            self.warps // warps,
            self.registers // (registers_of_warp * warps),
            self.shared // (shared + 1024),
        )
        return programs * warps / self.warps


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture(80, 163 * 1024, 164 * 1024),
        Architecture(90, 227 * 1024, 228 * 1024),
        Architecture(100, 227 * 1024, 228 * 1024),
    )
}


@dataclass(frozen=True)
class StandIn:
    """A tensor as a compiler sees it: its dtype and whether its address is a multiple of 16. Can be pickled."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        """An address of the same alignment."""
        return self.address

    @staticmethod
    def ptr_range() -> int:
        """As torch's tensors have on other makers' devices."""
        return 0


@dataclass(frozen=True)
class Variant:
    """One launch without its data; two variants with one key are one piece of machine code."""

    kernel: str
    """The kernel as `module:name`."""
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    key: str

    @property
    def name(self) -> str:
        """That of the kernel."""
        return self.kernel.partition(":")[2]


@dataclass(frozen=True)
class Derived:
    """What Triton derives from a launch's arguments."""

    key: str
    signature: dict[str, str]
    """The type of every argument, `constexpr` for those that are compiled in (None is one)."""
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    """Arguments that the compiler takes to be divisible by 16."""


@dataclass(frozen=True)
class Resources:
    """What the machine code of a kernel takes."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread's registers (or arrays) that lie in slow local memory."""
    shared: int
    """Bytes of a program."""
    warps: int

    def problems(self, architecture: Architecture) -> list[str]:
        """Why a kernel should not, or cannot, be launched so."""
        found = []
        if self.spilled > TOLERATED_SPILL:
            found.append(f"spills {self.spilled} bytes a thread")
        if self.shared > architecture.shared_of_program:
            most = architecture.shared_of_program / 1024
            found.append(f"{self.shared / 1024:.1f} KiB of shared memory, where {most:.0f} are the most")
        return found


class _NoDevice:
    """A driver of an architecture that is not there: enough for Triton's JIT to compile, nothing to launch with."""

    def __init__(self, architecture: Architecture) -> None:
        self.target = GPUTarget("cuda", architecture.number, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # the JIT keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_for(architecture: Architecture) -> None:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: what is meant for the interpreter cannot be compiled")
    drivers.set_active(_NoDevice(architecture))


def variant_of(launch: Launch) -> Variant:
    """The launch without its data."""
    function = launch.kernel.fn
    arguments = tuple(
        StandIn(a.dtype, _UNALIGNED if a.data_ptr() % 16 else _ALIGNED) if isinstance(a, torch.Tensor) else a
        for a in launch.arguments
    )
    options = tuple(sorted(launch.options.items()))
    kernel = f"{function.__module__}:{function.__qualname__}"
    return Variant(kernel, arguments, options, derive(launch.kernel, arguments, launch.options).key)


def derive(kernel: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Derived:
    """What Triton's JIT makes of a launch's arguments, before it compiles; `arguments` may hold `StandIn`s."""
    seen: dict[str, Any] = {}

    def instead_of_compiling(*, key: str, compile: dict[str, Any], **_: Any) -> bool:
        seen.update(compile, key=key)
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = instead_of_compiling
    try:
        _compile_for(_ANY)
        # The JIT asks the hook only for what it has not compiled yet.
        kernel.device_caches.pop(_ANY.number, None)
        kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    names = [parameter.name for parameter in kernel.params]
    divisible = [path[0] for path, facts in seen["configs"][0].items() if facts]
    return Derived(
        str(seen["key"]),
        seen["signature"],
        {names[path[0]]: value for path, value in seen["constants"].items()},
        tuple(names[index] for index in divisible),
    )


_ANY = ARCHITECTURES["sm_90"]


def compile_variant(variant: Variant, architecture: Architecture) -> Resources:
    """Compile a variant (or take it from Triton's cache) and read what its machine code takes."""
    module, _, name = variant.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), name)
    _compile_for(architecture)
    compiled = kernel.warmup(*variant.arguments, grid=(1,), **dict(variant.options))
    registers, spilled = _usage(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared, compiled.metadata.num_warps)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of the one kernel in a compiled file."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return used["REG"], used["STACK"] + used["LOCAL"]


@functools.cache
def _cuobjdump() -> str:
    """That which Triton brings along."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")

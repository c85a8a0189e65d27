"""Are the LoRA kernels right on this GPU? Every kernel over the sizes of the design, by the accuracy rule.

    python -m bench.lora.check                  every kernel and dtype, forward and backward, and beyond 2^31 elements
    python -m bench.lora.check --quick          a few small calls that reach every variant, for compute-sanitizer

The rule: an error against float64 with the same mask of at most twice that of plain PyTorch in the same dtype, and one
rounding of the greatest value. Float32 is multiplied as TF32 on both sides. Exit code 1: an error is above it, or time
ran out (--seconds) before all was checked; 2: there is no GPU; 3: the extension has no kernels for it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mtbert import kernels
from mtbert.kernels import Dropout, Segments, dispatch, extension, reference
from mtbert.kernels.segments import companion

KERNELS = ("sm90", "sm90_split", "sm80", "sm80_split")
"""Those that are served first come first: where time runs out, the others are left."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FAR_BYTES = 48 << 30
"""Free memory that tensors beyond 2^31 elements need, with their gradients."""
DROPOUT = Dropout(p=0.1, seed=(5 << 40) + 12345, step=7, site=3)


@dataclass(frozen=True)
class Case:
    """One call: lora_linear with one block of outputs, lora_qkv with three."""

    rows: int
    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    dropout: bool = True
    bounds: tuple[int, ...] = ()
    """Of groups of rows; none: one group."""


def cases() -> list[Case]:
    """Lengths, widths and ranks of the design, sizes that are no multiples of a tile, and a training step's."""
    lengths = [Case(rows, 384, 384, (8,)) for rows in (1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 512)]
    ranks = [
        Case(515, width, width, (rank,) * blocks)
        for width in (384, 768, 1024)
        for rank in (1, 4, 8, 16, 32, 64)
        for blocks in (1, 3)
    ]
    odd = [
        Case(77, 24, 40, (4,)),
        Case(200, 104, 88, (64,)),
        Case(333, 136, 200, (1, 64, 17)),
        Case(8192, 1096, 776, (33,)),
    ]
    steps = [
        Case(8192, inputs, outputs, (16,)) for inputs, outputs in ((768, 3072), (3072, 768), (1024, 4096))
    ]
    groups = [
        Case(1000, 768, 768, (16,), bounds=(0, 0, 70, 71, 640, 1000, 1000)),
        Case(1000, 384, 384, (8, 3, 5), bounds=(0, 333, 1000)),
    ]
    plain = [replace(case, dropout=False) for case in (*ranks[::5], *odd, *steps)]
    both = [replace(case, dropout=dropout) for case in quick_cases() for dropout in (False, True)]
    return [*lengths, *ranks, *odd, *steps, *groups, *plain, *both]


def quick_cases() -> list[Case]:
    """Every variant of the kernels, at sizes that a tool can follow; the most telling first.

    Tiles are wide, whichever the kernel, only where there are enough of them to keep a card busy: few inputs, many
    rows.
    """
    many = 108 * 128
    small = [
        Case(200, 104, 136, (16,)),
        Case(131, 96, 72, (8, 1, 5), bounds=(0, 0, 40, 131)),
        Case(100, 72, 264, (64,), dropout=False),
    ]
    wide = [
        Case(many, 256, 256, (16,)),
        Case(many, 192, 192, (8,), dropout=False),
        Case(many, 64, 256, (64,)),
        Case(many, 64, 192, (32,)),
        Case(many, 64, 256, (32,), dropout=False),
        Case(many, 64, 192, (64,)),
        Case(many, 64, 256, (8,)),
        Case(many, 64, 192, (16,), dropout=False),
    ]
    rest = [
        Case(140, 64, 72, (32, 17, 30)),
        Case(70, 64, 72, (64, 33, 1)),
        Case(40, 64, 72, (8,), dropout=False),
        Case(150, 72, 128, (16,), dropout=False),
    ]
    return [*small, *wide, *rest]


class Forced:
    """The extension's functions with one kernel forced. Thin passes have no choice."""

    def __init__(self, functions: Any, kernel: str) -> None:
        self._functions, self._kernel = functions, kernel

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._functions, name)
        if name not in ("lora_forward", "lora_input"):
            return function

        def call(**given: Any) -> None:
            split = name == "lora_forward"
            function(kernel=self._kernel if split else self._kernel.removesuffix("_split"), **given)

        return call


@contextmanager
def forced(kernel: str | None) -> Iterator[None]:
    """Within a `with` block, the extension serves with one kernel; None: as the public functions are."""
    if kernel is None:
        yield
        return
    with extension.cuda_stand_in(Forced(extension.part("cuda"), kernel)), dispatch.use_backend("cuda"):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Within a `with` block, fresh results hold NaN and fresh workspaces ones, so that what nobody writes is seen."""
    fresh = Tensor.new_empty

    def fill(self: Tensor, *size: Any, **options: Any) -> Tensor:
        made = fresh(self, *size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 0xFF)

    with mock.patch.object(Tensor, "new_empty", fill):
        yield


def worst_error(case: Case, dtype: torch.dtype, device: torch.device, kernel: str | None) -> float:
    """The greatest error of output and gradients, as a share of the allowed; NaN counts as infinite."""
    t = _Tensors(case, dtype, device)
    with forced(kernel), poisoned():
        found = t.run(kernels, dtype)
    plain, exact = t.run(reference, dtype), t.run(reference, torch.float64)
    worst = 0.0
    for f, p, e in zip(found, plain, exact, strict=True):
        if e.numel() == 0:
            continue
        truth = e.double()
        allowed = 2 * (p.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        error = (f.double() - truth).abs().max()
        share = (error / allowed).item() if allowed > 0 else (0.0 if error == 0 else float("inf"))
        worst = max(worst, share) if share == share else float("inf")
    return worst


class _Tensors:
    """Random inputs of a case that every dtype under test holds."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(case.rows + case.inputs)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device) * scale
            return drawn.to(torch.bfloat16)

        small = case.inputs**-0.5
        total = case.outputs * len(case.ranks)
        self.x, self.weight = random(case.rows, case.inputs), random(total, case.inputs, scale=small)
        self.bias, self.gradient = random(total), random(case.rows, total)
        self.adapters = [
            (random(rank, case.inputs, scale=small), random(case.outputs, rank, scale=0.5))
            for rank in case.ranks
        ]
        self.rows = torch.arange(case.rows, dtype=torch.int32, device=device) * 4096 - 77

    def run(self, module: Any, dtype: torch.dtype) -> list[Tensor]:
        """The output and the gradients of x and the adapters (or of their companions)."""
        case = self.case
        x = self.x.to(dtype, copy=True).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        pairs = [tuple(p.to(wide, copy=True).requires_grad_() for p in pair) for pair in self.adapters]
        parameters = [p for pair in pairs for p in pair]
        options: dict[str, Any] = {"scale": 2.0, "dropout_row": self.rows}
        options["dropout"] = DROPOUT if case.dropout else None
        takers = parameters
        if case.bounds:
            companions = {p: companion(p, len(case.bounds) - 1) for p in parameters}
            options["segments"] = Segments(case.bounds, companions)
            takers = list(companions.values())
        constants = (self.weight.to(dtype), self.bias.to(dtype))
        if len(pairs) == 1:
            output = module.lora_linear(x, *constants, *pairs[0], **options)
        else:
            output = module.lora_qkv(x, *constants, tuple(pairs), **options)
        gradients = torch.autograd.grad(output, [x, *takers], self.gradient.to(dtype))
        parts = [part for g in gradients[1:] for part in (g.unbind() if case.bounds else (g,))]
        return [output.detach(), gradients[0], *parts]


_FAR = Case(2_900_096, 768, 768, (8,))
"""x, the result and their gradients have more than 2^31 elements."""


def beyond_2_31(device: torch.device, kernel: str | None, case: Case = _FAR, some: int = 1024) -> float:
    """How far the last `some` rows of a great case are from the same rows on their own, relatively, by one kernel."""
    t = _Tensors(case, torch.bfloat16, device)
    part = _Tensors(replace(case, rows=some), torch.bfloat16, device)
    part.x, part.gradient, part.rows = t.x[-some:], t.gradient[-some:], t.rows[-some:]
    part.weight, part.bias, part.adapters = t.weight, t.bias, t.adapters
    with forced(kernel), poisoned():
        whole = t.run(kernels, torch.bfloat16)[:2]
        alone = part.run(kernels, torch.bfloat16)[:2]
    distances = [
        (w[-some:].float() - a.float()).abs().max() / a.float().abs().max()
        for w, a in zip(whole, alone, strict=True)
    ]
    return max(distance.item() if distance == distance else float("inf") for distance in distances)


def problem(device: torch.device) -> str | None:
    """Why the extension has nothing to be checked on a GPU, or not all; None where it has."""
    gpu = extension.capability(device)
    if gpu is None:
        return None
    if not hasattr(extension.part("cuda"), "lora_forward"):
        return extension.problem or "the extension mtbert._C was built without nvcc"
    built = ", ".join(extension.architectures())
    name = f"{gpu[0]}.{gpu[1]}"
    if gpu < (8, 0) or not extension.has_code_for(gpu):
        return f"the GPU has compute capability {name}, and the extension was built for {built}"
    if gpu == (9, 0) and "sm_90a" not in extension.architectures():
        return (
            f"the GPU has compute capability {name}, and the extension was built for {built}, without sm_90a"
        )
    return None


def served(device: torch.device) -> list[tuple[str | None, torch.dtype]]:
    """The kernels that a device can run, each with the dtypes that it computes; None: as the public functions are."""
    gpu = extension.capability(device)
    if gpu is None:
        return [(None, dtype) for dtype in DTYPES]
    names = [name for name in KERNELS if gpu == (9, 0) or not name.startswith("sm90")]
    return [
        (name, dtype)
        for dtype in DTYPES
        for name in names
        if not (dtype == torch.float32 and name.startswith("sm90"))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.lora.check", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few small calls, for compute-sanitizer")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try this script")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing more after this time"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here that PyTorch can use: nothing was run", file=sys.stderr)
        return 2
    missing = problem(device)
    if missing is not None:
        print(f"{missing}: nothing was run", file=sys.stderr)
        return 3
    end = time.monotonic() + options.seconds
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        bad, left = _run(device, quick_cases() if options.quick else cases(), end)
        if not options.quick and device.type == "cuda":
            far_bad, far_left = _run_far(device, end)
            bad, left = bad + far_bad, left + far_left
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    if left:
        print(f"OUT OF TIME: {left} calls were not checked")
    print("every error found is within the rule" if not bad else f"{bad} ABOVE THE RULE")
    return 1 if bad or left else 0


def _run(device: torch.device, chosen: Sequence[Case], end: float) -> tuple[int, int]:
    """How many errors are above the rule, and how many calls there was no time for."""
    bad = left = 0
    for kernel, dtype in served(device):
        begin, worst, where, done = time.monotonic(), 0.0, chosen[0], 0
        for case in chosen:
            if time.monotonic() >= end:
                break
            share = worst_error(case, dtype, device, kernel)
            done += 1
            if share > worst:
                worst, where = share, case
            if share > 1.0:
                bad += 1
                print(f"ABOVE THE RULE: {kernel}, {dtype}, {case}: {share:.3g} of the allowed", flush=True)
        left += len(chosen) - done
        print(
            f"{kernel or 'as dispatched'}, {dtype}: {done} of {len(chosen)} cases, error at most {worst:.2f} of the"
            f" allowed ({where}), {time.monotonic() - begin:.1f} s",
            flush=True,
        )
    return bad, left


def _run_far(device: torch.device, end: float) -> tuple[int, int]:
    """The same of the case beyond 2^31 elements, by every kernel."""
    bad = left = 0
    for kernel, dtype in served(device):
        if dtype != torch.bfloat16:
            continue
        free = torch.cuda.mem_get_info(device)[0]
        if time.monotonic() >= end or free < _FAR_BYTES:
            left += 1
            print(f"beyond 2^31 elements, {kernel}: not checked ({free >> 30} GiB are free)", flush=True)
            continue
        far = beyond_2_31(device, kernel)
        torch.cuda.empty_cache()
        print(
            f"beyond 2^31 elements, {kernel}: the last rows are {far:.2g} of the greatest value away",
            flush=True,
        )
        bad += far > 0.02
    return bad, left


if __name__ == "__main__":
    sys.exit(main())

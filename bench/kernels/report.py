"""What every Triton kernel compiles to, on a machine without a GPU: registers, spills, shared memory, occupancy.

    python -m bench.kernels.report                   every variant for sm_80, sm_90 and sm_100 (many minutes)
    python -m bench.kernels.report --quick           what a bf16 training step launches, for sm_80 and sm_90
    python -m bench.kernels.report --markdown bench/results/kernels-compiled.md

The launches are recorded while the public operations run forward and backward on small tensors of the real widths, so
what is compiled is what would run. Exit code 1: a kernel spills registers, wants more shared memory than the
architecture has, or does not compile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from bench.kernels.cases import all_cases, distinct, quick_cases
from bench.kernels.compile import ARCHITECTURES, Resources, Variant, compile_variant
from bench.kernels.traffic import TOKENS, table

QUICK_ARCHITECTURES = ("sm_80", "sm_90")
_TITLES = ("kernel", "variant", "arch", "registers", "spilled", "shared KiB", "warps", "occupancy")


_PAGE = """\
# What the Triton kernels compile to

Written by `{command}`
with {versions}. No GPU took part: these are the compiler's figures for the
launches that the operations make. A *variant* is one piece of machine code; `(+n)`: n more cases need the same one.
Registers and spilled bytes are a thread's. Shared memory is a program's, and a program can have so many KiB:
{limits}. Occupancy is the share of a multiprocessor's warps that can be resident at the
same time, as registers, shared memory and warps allow.
"""


@dataclass(frozen=True)
class Row:
    """One variant on one architecture."""

    kernel: str
    variants: list[str]
    """The cases that need it."""
    options: dict[str, object]
    """What is compiled in, and the launch's num_warps and num_stages where it sets them."""
    architecture: str
    resources: Resources | None
    """None: it did not compile."""
    occupancy: float
    problems: list[str]


def _compiled(task: tuple[Variant, str]) -> tuple[Resources | None, str]:
    variant, architecture = task
    torch.set_num_threads(1)
    try:
        return compile_variant(variant, ARCHITECTURES[architecture]), ""
    except Exception as error:  # whatever a compiler raises is a line of the report
        return None, f"{type(error).__name__}: {error}"


def report(
    variants: Iterable[tuple[Variant, list[str]]], architectures: Sequence[str], processes: int
) -> list[Row]:
    """Compile every variant for every architecture, ordered by kernel."""
    ordered = sorted(variants, key=lambda pair: pair[0].kernel)
    tasks = [(variant, name) for variant, _ in ordered for name in architectures]
    labels = [found for _, found in ordered for _ in architectures]
    rows = []
    compiled = tqdm(_each(tasks, processes), total=len(tasks), unit="kernel", disable=None)
    for (variant, name), cases, (resources, failure) in zip(tasks, labels, compiled, strict=True):
        problems, occupancy = [failure] if failure else [], 0.0
        if resources is not None:
            architecture = ARCHITECTURES[name]
            problems += resources.problems(architecture)
            occupancy = architecture.occupancy(resources.registers, resources.shared, resources.warps)
        options = dict(variant.options)
        rows.append(Row(variant.name, cases, options, name, resources, occupancy, problems))
    return rows


def _each(tasks: list[tuple[Variant, str]], processes: int) -> Iterator[tuple[Resources | None, str]]:
    if processes == 1:
        yield from map(_compiled, tasks)
        return
    # Not forked: torch has threads by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compiled, tasks)


def to_text(rows: Sequence[Row]) -> str:
    """A table for the terminal, then the problems."""
    lines = [_TITLES, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_TITLES))]
    text = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*text, "", *_verdict(rows)])


def _cells(row: Row) -> tuple[str, ...]:
    more = f" (+{len(row.variants) - 1})" if len(row.variants) > 1 else ""
    name = (row.kernel, f"{row.variants[0]}{more}", row.architecture)
    if row.resources is None:
        return (*name, "does not compile", "", "", "", "")
    r = row.resources
    numbers = (str(r.registers), str(r.spilled), f"{r.shared / 1024:.1f}", str(r.warps))
    return (*name, *numbers, f"{100 * row.occupancy:.0f}%")


def _verdict(rows: Sequence[Row]) -> list[str]:
    bad = [row for row in rows if row.problems]
    if not bad:
        spills = [
            row.resources.spilled for row in rows if row.resources is not None and row.resources.spilled
        ]
        spilling = f"{len(spills)} spill, {max(spills)} bytes at most" if spills else "none spills registers"
        return [
            f"{len(rows)} compiled kernels: {spilling}, and none wants more shared memory than its architecture has"
        ]
    return [
        f"PROBLEM: {row.kernel} ({row.variants[0]}) on {row.architecture}: {'; '.join(row.problems)}"
        for row in bad
    ]


def to_markdown(rows: Sequence[Row], command: str, traffic: Sequence[tuple[str, ...]] = ()) -> str:
    """The page that is committed: a line a kernel, then a line a variant with all architectures beside each other.

    traffic: the lines of `bench.kernels.traffic.table`.
    """
    names = list(dict.fromkeys(row.architecture for row in rows))
    limits = (f"{ARCHITECTURES[name].shared_of_program // 1024} on {name}" for name in names)
    rule = f"{' | '.join('---' for _ in names)} |"
    versions = f"triton {triton.__version__} and torch {torch.__version__}"
    text = [
        _PAGE.format(command=command, versions=versions, limits=", ".join(limits)),
        *(f"- {line}" for line in _verdict(rows)),
        "",
        "## By kernel: registers, shared KiB, occupancy",
        "",
        f"| kernel | variants | {' | '.join(names)} |",
        f"| --- | --- | {rule}",
    ]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        mine = [row for row in rows if row.kernel == kernel]
        cells = [_range([row for row in mine if row.architecture == name]) for name in names]
        text.append(f"| {kernel} | {len(mine) // len(names)} | {' | '.join(cells)} |")
    text += [
        "",
        "## By variant: registers, spilled bytes, shared KiB, occupancy",
        "",
        f"| kernel | variant | warps | {' | '.join(names)} |",
        f"| --- | --- | --- | {rule}",
    ]
    for start in range(0, len(rows), len(names)):
        same = rows[start : start + len(names)]
        kernel, variant, *_ = _cells(same[0])
        cells = [", ".join(part for i, part in enumerate(_cells(row)[3:]) if i != 3) for row in same]
        warps = "" if same[0].resources is None else same[0].resources.warps
        text.append(f"| {kernel} | {variant} | {warps} | {' | '.join(cells)} |")
    if traffic:
        titles, *lines = traffic
        text += [
            "",
            f"## Bytes and FLOPs: {TOKENS:,} tokens of sentences, bf16, dropout 0.1",
            "",
            "By formula. The least: each input read and each output written once (`bench/kernels/bytes.py`). Moved:",
            "what the kernels read and write, what a cache serves included (`bench/kernels/traffic.py`).",
            "",
            f"| {' | '.join(titles)} |",
            f"|{' --- |' * len(titles)}",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    return "\n".join(text) + "\n"


def _range(rows: Sequence[Row]) -> str:
    good = [(row, row.resources) for row in rows if row.resources is not None]
    if not good:
        return "does not compile"

    def span(values: list[float]) -> str:
        low, high = f"{min(values):.0f}", f"{max(values):.0f}"
        return low if low == high else f"{low}-{high}"

    return ", ".join(
        (
            span([r.registers for _, r in good]),
            span([r.shared / 1024 for _, r in good]),
            span([100 * row.occupancy for row, _ in good]) + "%",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if os.environ.pop("TRITON_INTERPRET", None) is not None:
        # Triton has been imported for its interpreter: another process must do it.
        return subprocess.run([sys.executable, "-m", "bench.kernels.report", *given], check=False).returncode
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="only what a bf16 training step launches")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), help="architectures")
    parser.add_argument(
        "--operation", nargs="+", help="only these: attention, add_layer_norm, bias_gelu, ..."
    )
    parser.add_argument("--processes", type=int, default=2, help="how many compile at the same time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--markdown", type=Path, help="write the page of bench/results too")
    options = parser.parse_args(given)

    begin = time.monotonic()
    torch.set_num_threads(1)
    cases = list(quick_cases() if options.quick else all_cases())
    if options.operation:
        cases = [(operation, setting) for operation, setting in cases if operation in options.operation]
    architectures = options.arch or (QUICK_ARCHITECTURES if options.quick else tuple(ARCHITECTURES))
    variants = distinct(cases)
    print(f"{len(variants)} variants for {', '.join(architectures)}", file=sys.stderr, flush=True)
    rows = report(variants.values(), architectures, options.processes)
    if options.json:
        versions = {
            "triton": triton.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        }
        print(json.dumps({"versions": versions, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(to_text(rows))
    if options.markdown is not None:
        # Where the page was written to on this machine is nobody's business.
        command = " ".join(["python -m bench.kernels.report", *given])
        command = command.replace(str(options.markdown), options.markdown.name)
        options.markdown.write_text(to_markdown(rows, command, table()), encoding="utf-8")
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 1 if any(row.problems for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

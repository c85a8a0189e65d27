"""All that is to be known on a machine with a GPU, into one folder: three times under ten minutes.

    python -m bench.gpu --output FOLDER                the Triton kernels, and whatever dispatch chooses
    python -m bench.gpu --output FOLDER --set lora     the CUDA extension's LoRA products
    python -m bench.gpu --output FOLDER --set graphs   captured training steps, and their input
    python -m bench.gpu --output FOLDER --set training whole steps beside their peers, and the speedrun

Builds and installs nothing: `pip install --no-build-isolation --no-deps -e .` first, on a machine without network with
wheels of jsonargparse, pytest and pytest-benchmark beside it. In turn, each with a limit of time: the doctor; the tests
of the kernels, which run on the GPU where there is one; the comparisons of bench/test_kernels.py with the goals set for
them; the compile report. For LoRA: its tests; every kernel over the design's sizes (bench/lora/check.py); the
comparisons of bench/test_lora.py; compute-sanitizer's memcheck and racecheck over a few small calls. For graphs:
captured steps beside their twins (bench/graphs_check.py); input made ready on a thread (bench/test_input.py). For
training: bench/test_train_step.py and bench/test_surgery.py, with those of `transformers`, `peft` and
`sentence-transformers` as peers that are installed, and bench/speedrun.py on the tables in ../shared/data. Every part
leaves NAME.txt; the comparisons leave DEVICE.json too, to be committed under bench/results. Exit code 2: there is no
GPU; 3: the extension has no LoRA kernels for it; 1: a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.lora import check as lora_check

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 580
_TAIL = 4000
"""Characters of a part's output that are shown; all of it is in the file."""


@dataclass(frozen=True)
class Part:
    """One command, and how long it may take."""

    name: str
    command: list[str]
    seconds: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Beside that of this process."""


SETS = ("kernels", "lora", "graphs", "training")


def parts(output: Path, cores: int, chosen: str = "kernels") -> list[Part]:
    """The parts of a set, the most useful first: those behind may be cut short."""
    # Not pyproject.toml's options: pytest-xdist may be missing. One file that lacks a package stops no other.
    options = ["-o", "addopts=--import-mode=importlib -ra", "--continue-on-collection-errors"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    spread = ["-n", str(min(8, cores))] if importlib.util.find_spec("xdist") else []
    record = ["--results", str(output), f"--benchmark-json={output / f'rounds-{chosen}.json'}"]
    if chosen == "lora":
        tests = ["tests/kernels/test_lora_cuda.py", "tests/installation/test_cuda_lora.py"]
        check = [sys.executable, "-m", "bench.lora.check", "--seconds"]
        sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
        # PyTorch hands out parts of larger pieces of memory: what lies beside a tensor would look like a tensor's.
        apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [
            Part("lora-tests", [*pytest, *tests, "--durations=5", *spread], 100),
            Part("lora-check", [*check, "105"], 120),
            Part("lora", [*pytest, "bench/test_lora.py", "--device", "cuda", *record], 190),
            Part("lora-memcheck", [*sanitizer, "memcheck", *check, "60", "--quick"], 80, apart),
            Part("lora-racecheck", [*sanitizer, "racecheck", *check, "60", "--quick"], 80),
        ]
    if chosen == "graphs":
        return [
            Part("graphs", [sys.executable, "-m", "bench.graphs_check"], 360),
            Part("input", [*pytest, "bench/test_input.py", "--device", "cuda", *record], 200),
        ]
    if chosen == "training":
        steps = ["bench/test_train_step.py", "bench/test_surgery.py", "--device", "cuda"]
        return [
            Part("training", [*pytest, *steps, *record], 330),
            Part("speedrun", [sys.executable, "-m", "bench.speedrun", "--results", str(output)], 240),
        ]
    report = ["--quick", "--processes", str(max(1, cores // 2)), "--markdown", str(output / "compiled.md")]
    return [
        Part("doctor", [sys.executable, "-m", "mtbert.doctor"], 60),
        Part("tests", [*pytest, "tests/kernels", "--durations=10", *spread], 240),
        Part("kernels", [*pytest, "bench/test_kernels.py", "--device", "cuda", *record], 360),
        Part("report", [sys.executable, "-m", "bench.kernels.report", *report], 120),
    ]


def run(part: Part, output: Path, seconds: float) -> str:
    """Run a part with its output in a file; returns `ok`, or what went wrong."""
    path = output / f"{part.name}.txt"
    with path.open("w", encoding="utf-8") as file:
        # A group of its own, so that a limit ends the processes that it started too.
        try:
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **part.environment},
                start_new_session=True,
            )
        except OSError as error:
            return f"{part.command[0]} cannot be run: {error.strerror}"
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s"
    return "ok" if code == 0 else f"exit code {code}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of what is found")
    parser.add_argument("--set", choices=SETS, default=SETS[0], help="what is run")
    parser.add_argument(
        "--only", nargs="+", help="only these parts of it: doctor, tests, kernels, report, training, ..."
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no GPU here that PyTorch can use: nothing was run", file=sys.stderr)
        return 2
    missing = lora_check.problem(torch.device("cuda")) if options.set == "lora" else None
    if missing is not None:
        print(f"{missing}: nothing was run", file=sys.stderr)
        return 3
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    begin, results = time.monotonic(), {}
    for part in parts(output, os.cpu_count() or 1, options.set):
        if options.only and part.name not in options.only:
            continue
        left = SECONDS - (time.monotonic() - begin)
        started = time.monotonic()
        found = run(part, output, min(part.seconds, left)) if left > 5 else "no time left"
        results[part.name] = found
        print(f"==== {part.name}: {found}, {time.monotonic() - started:.0f} s", flush=True)
        path = output / f"{part.name}.txt"
        if path.is_file():
            print(path.read_text(encoding="utf-8", errors="replace")[-_TAIL:], flush=True)
    print("\n".join(f"{name}: {found}" for name, found in results.items()))
    return 0 if all(found == "ok" for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

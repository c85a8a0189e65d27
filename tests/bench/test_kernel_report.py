"""The compile report: it sees spills and oversized kernels, and finds none in what a training step launches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, interpreter: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in the checkout, with one thread, with or without Triton's interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    if not interpreter:
        del environment["TRITON_INTERPRET"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    """What made_up_kernels.py prints."""
    done = run(str(Path(__file__).with_name("made_up_kernels.py")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_kernel_of_a_training_step_spills_or_takes_too_much_shared_memory() -> None:
    # With the interpreter asked for, as in this process: the report must see to a process without it.
    done = run("-m", "bench.kernels.report", "--quick", "--json", interpreter=True)
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads(done.stdout)["rows"]
    problems = [(row["kernel"], row["architecture"], row["problems"]) for row in rows if row["problems"]]
    assert problems == []
    assert done.returncode == 0
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90"}
    from bench.kernels.compile import TOLERATED_SPILL

    kernels = {row["kernel"] for row in rows}
    for operation in (
        "attention",
        "first_token_attention",
        "add_layer_norm",
        "bias_gelu",
        "embedding",
        "dropout",
    ):
        assert any(operation in kernel for kernel in kernels), (operation, kernels)
    for row in rows:
        assert row["resources"]["spilled"] <= TOLERATED_SPILL
        assert 0 < row["resources"]["registers"] <= 255
        assert 0 < row["occupancy"] <= 1


def test_arguments_are_specialised_as_triton_does(said: dict[str, Any]) -> None:
    derived = said["derived"]
    assert derived["signature"] == {
        "x": "*fp32",
        "out": "*fp32",
        "nothing": "constexpr",
        "count": "i32",
        "one": "constexpr",
        "free": "i32",
        "factor": "fp32",
        "SIZE": "constexpr",
    }
    assert derived["constants"] == {"nothing": None, "one": 1, "SIZE": 32}
    # Not `out`, whose address is no multiple of 16, and not `free`, which is 32 but must not be looked at.
    assert derived["divisible"] == ["x", "count"]
    assert derived["other"] == derived["key"]
    assert derived["unlike"] != derived["key"]


def test_kernels_are_those_of_a_gpu(said: dict[str, Any]) -> None:
    """Not those for the interpreter, though dispatch was told that it stands in for a GPU."""
    assert said["interpreted"] is False


def test_spills_oversized_and_broken_kernels_are_seen(said: dict[str, Any]) -> None:
    rows = {(row["kernel"], row["architecture"]): row for row in said["reported"]["rows"]}
    for architecture, most in (("sm_80", 163), ("sm_90", 227)):
        good, spilling = rows["add", architecture], rows["spilling", architecture]
        oversized, mistaken = rows["oversized", architecture], rows["mistaken", architecture]
        assert good["problems"] == []
        assert good["resources"]["spilled"] == 0
        assert good["resources"]["warps"] == 4
        assert spilling["resources"]["spilled"] > 0
        assert spilling["problems"] == [f"spills {spilling['resources']['spilled']} bytes a thread"]
        assert oversized["resources"]["shared"] > 227 * 1024
        assert oversized["problems"][0].endswith(f"KiB of shared memory, where {most} are the most")
        assert oversized["occupancy"] == 0
        assert mistaken["resources"] is None
        assert "CompilationError" in mistaken["problems"][0]
    text = said["reported"]["text"]
    assert "PROBLEM: spilling (spilling) on sm_80: spills" in text
    assert "none spills" not in text


def test_nothing_recompiles_from_step_to_step(said: dict[str, Any]) -> None:
    """Tokens, rows, lengths, seed, step and rate are no part of the compiled code."""
    recorded = said["recorded"]
    assert len(recorded) >= 6
    for operation, calls in recorded.items():
        expected = calls.pop("as is")
        assert expected, operation
        for change, keys in calls.items():
            assert keys == expected, f"{operation}: {change} compiles anew"


def test_occupancy_by_hand() -> None:
    from bench.kernels.compile import ARCHITECTURES, Resources

    hopper, ampere = ARCHITECTURES["sm_90"], ARCHITECTURES["sm_80"]
    assert hopper.occupancy(registers=32, shared=0, warps=4) == 1.0  # 16 programs of 4 warps
    assert hopper.occupancy(registers=128, shared=0, warps=4) == 0.25  # 65536 / (128 x 128) = 4 programs
    assert hopper.occupancy(registers=129, shared=0, warps=4) == 3 / 16  # registers come in eights
    assert hopper.occupancy(registers=32, shared=0, warps=1) == 0.5  # 32 programs at most
    assert hopper.occupancy(registers=32, shared=56 * 1024, warps=8) == 0.5  # 228 / 57 = 4 programs
    assert ampere.occupancy(registers=32, shared=56 * 1024, warps=8) == 0.25
    assert ampere.occupancy(registers=32, shared=200 * 1024, warps=8) == 0.0
    assert hopper.occupancy(registers=32, shared=200 * 1024, warps=8) == 0.125
    assert Resources(32, 0, 200 * 1024, 8).problems(hopper) == []
    assert Resources(32, 0, 200 * 1024, 8).problems(ampere) != []


def test_the_page_has_a_line_for_every_kernel_and_every_variant() -> None:
    from bench.kernels.compile import Resources
    from bench.kernels.report import Row, to_markdown

    rows = [
        Row("one", ["a", "b"], {}, name, Resources(40 + n, 0, 2048, 4), 0.5, [])
        for n, name in enumerate(("sm_80", "sm_90"))
    ]
    rows += [Row("two", ["c"], {}, name, None, 0.0, ["CompilationError"]) for name in ("sm_80", "sm_90")]
    page = to_markdown(rows, "the command", [("operation", "MB"), ("dropout", "1.5")])
    assert "| one | 1 | 40, 2, 50% | 41, 2, 50% |" in page
    assert "| one | a (+1) | 4 | 40, 0, 2.0, 50% | 41, 0, 2.0, 50% |" in page
    assert "| two | 1 | does not compile | does not compile |" in page
    assert "PROBLEM: two (c) on sm_80: CompilationError" in page
    assert "| operation | MB |\n| --- | --- |\n| dropout | 1.5 |" in page

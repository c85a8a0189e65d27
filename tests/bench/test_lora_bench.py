"""The LoRA bench: sides that compute the same, goals, the check of the kernels, and runs at a tiny size."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.lora_extension import HostExtension
from support.lora_variants import EVERY_KERNEL, forward_variant, input_variant, thin_variants
from torch import Tensor

from bench import gpu
from bench.comparison import to_text
from bench.kernels.timing import Stopwatch
from bench.lora import check as lora_check
from bench.lora import comparisons as lora_comparisons
from bench.lora import model as lora_model
from bench.lora import qkv_comparisons as lora_qkv_comparisons
from bench.lora.comparisons import (
    BARE,
    BUILDERS,
    COMPILED,
    EAGER,
    OWN,
    OWN_WIDE,
    PEFT,
    PEFT_WIDE,
    Inputs,
    Plan,
)
from bench.lora.qkv_comparisons import QkvPlan
from bench.measure import Alternation
from mtbert.errors import ConfigError
from mtbert.kernels import dispatch, extension

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
PLAN = Plan(24, 16, 40, 4, 0.0, CPU, torch.float32)
QKV = QkvPlan(24, 16, 40, 4, 0.0, CPU, torch.float32)
H200 = Plan(8192, 768, 768, 16, 0.1, torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("side", [side for side in BUILDERS if side not in (BARE, COMPILED)])
def test_the_sides_compute_the_same(side: str) -> None:
    if "peft" in side:
        pytest.importorskip("peft")
    expected: Any = BUILDERS[EAGER](Inputs(PLAN))()
    found: Any = BUILDERS[side](Inputs(PLAN))()
    assert len(found) == 3
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    forward = replace(PLAN, backward=False)
    torch.testing.assert_close(BUILDERS[side](Inputs(forward))(), BUILDERS[EAGER](Inputs(forward))())


@pytest.mark.parametrize("side", [side for side in lora_qkv_comparisons.BUILDERS if side != BARE])
def test_the_sides_for_queries_keys_and_values_compute_the_same(side: str) -> None:
    if "peft" in side:
        pytest.importorskip("peft")
    builders = lora_qkv_comparisons.BUILDERS
    t = Inputs(QKV)
    parts = zip(t.weight.chunk(3), t.bias.chunk(3), t.adapters, strict=True)
    expected = [t.x @ w.t() + c + lora_comparisons.SCALE * t.x @ a.t() @ b.t() for w, c, (a, b) in parts]
    found: Any = builders[side](Inputs(replace(QKV, backward=False)))()
    torch.testing.assert_close(
        found if isinstance(found, Tensor) else torch.cat(found, 1), torch.cat(expected, 1)
    )
    gradients: Any = builders[EAGER](Inputs(QKV))()
    same: Any = builders[side](t)()
    assert len(same) == 7
    for f, e in zip(same, gradients, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_a_comparison_of_queries_keys_and_values() -> None:
    pytest.importorskip("peft")
    builders = lora_qkv_comparisons.BUILDERS
    found = lora_comparisons.compare(QKV, Stopwatch(CPU, 1), lambda a: a.round(), builders=builders)
    assert found.left_out == []
    assert [case.name for case in found.cases] == list(builders)
    assert found.name == "lora qkv, 16x40, rank 4, no dropout, 24 tokens, forward and backward"
    assert {goal.to for goal in QKV.goals()} == set(builders) - {OWN}


def test_the_bare_side_is_the_frozen_product() -> None:
    t = Inputs(replace(PLAN, backward=False))
    torch.testing.assert_close(BUILDERS[BARE](t)(), t.x @ t.weight.t() + t.bias)
    (dx,) = BUILDERS[BARE](Inputs(PLAN))()  # type: ignore[misc]
    torch.testing.assert_close(dx, t.gradient @ t.weight)


def test_peft_s_default_is_wide() -> None:
    pytest.importorskip("peft")
    plan = replace(PLAN, dtype=torch.bfloat16)
    for side, dtype in ((PEFT, torch.bfloat16), (PEFT_WIDE, torch.float32)):
        x, a, b = BUILDERS[side](Inputs(plan))()  # type: ignore[misc]
        assert x.dtype == torch.bfloat16
        assert a.dtype == b.dtype == dtype


@pytest.mark.parametrize("side", [OWN, OWN_WIDE, lora_qkv_comparisons.THREE])
def test_on_a_gpu_mtbert_s_sides_are_the_extension_s(side: str) -> None:
    """Dispatch may give PyTorch's composition to a call that does not ask for the extension."""
    for plan, builders in ((PLAN, BUILDERS), (QKV, lora_qkv_comparisons.BUILDERS)):
        if side not in builders:
            continue
        t = Inputs(replace(plan, dtype=torch.bfloat16))
        functions = HostExtension()
        with extension.cuda_stand_in(functions):
            builders[side](t)()
            assert functions.calls == []  # on a CPU by the backend in force
            t.plan = replace(t.plan, device=torch.device("cuda"))
            builders[side](t)()
        assert {"lora_forward", "lora_low", "lora_input", "lora_grad_a"} <= {
            name for name, _ in functions.calls
        }
    with pytest.raises(ConfigError, match="kernels=cuda cannot serve"):
        builders[side](t)()  # on tensors in host memory


def test_what_served_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with extension.cuda_stand_in(HostExtension()):
        assert H200.implementation() == "cuda"
    found = lora_comparisons.compare(
        PLAN, Stopwatch(CPU, 1), lambda a: a.round(), without=(COMPILED, PEFT, PEFT_WIDE)
    )
    assert found.to_record()["implementations"] == {OWN: "cpu", OWN_WIDE: "cpu"}
    assert "mtbert is served by cpu" in to_text(found)

    class Planning(HostExtension):
        def lora_plan(self, **given: Any) -> dict[str, str]:
            self.calls.append(("lora_plan", given))
            return {"forward": "sm90", "input": "sm80"}

    functions = Planning()
    monkeypatch.setattr(extension, "capability", lambda device: (9, 0))
    monkeypatch.setattr(extension, "architectures", lambda: ["sm_90a"])
    with extension.cuda_stand_in(functions):
        qkv = replace(QKV, device=torch.device("cuda"), dtype=torch.bfloat16)
        assert qkv.implementation() == "cuda, sm90 forward and sm80 for the input's gradient"
    (given,) = [given for name, given in functions.calls if name == "lora_plan"]
    assert given["outputs"] == 3 * QKV.outputs
    assert (given["rank"], given["blocks"], given["threshold"]) == (8, 3, 0)
    monkeypatch.setattr(extension, "architectures", lambda: ["sm_80"])
    with extension.cuda_stand_in(functions), pytest.raises(ConfigError, match="must be built for it"):
        H200.implementation()


def wanted(plan: Plan) -> dict[str, list[float]]:
    """The goals that are set, by the side they are measured against."""
    found: dict[str, list[float]] = {}
    for goal in plan.goals():
        if goal.at_least is not None:
            found.setdefault(goal.to, []).append(goal.at_least)
    return found


def test_the_goals() -> None:
    assert wanted(H200) == {
        BARE: [pytest.approx(1 / 1.5, rel=1e-3), pytest.approx(1 / 1.3, rel=1e-3)],
        PEFT: [2.3],
    }
    forward = replace(H200, backward=False)
    assert wanted(forward) == {BARE: [pytest.approx(1 / 1.4, rel=1e-3)]}
    assert wanted(replace(forward, outputs=3072)) == {BARE: [pytest.approx(1 / 1.25, rel=1e-3)]}
    assert wanted(replace(forward, p=0.0)) == {BARE: [pytest.approx(1 / 1.15, rel=1e-3)]}
    rate = 0.9 / (1 + 8 / 768 + 8 / 768)
    assert wanted(replace(forward, p=0.0, rank=8)) == {BARE: [pytest.approx(rate, rel=1e-3)]}
    for unaimed in (
        replace(H200, inputs=384, outputs=384),
        replace(H200, tokens=64),
        replace(H200, device=CPU),
        replace(forward, rank=64),
    ):
        assert wanted(unaimed) == {}
    for plan in (H200, forward):
        assert {goal.to for goal in plan.goals()} == {BARE, PEFT, PEFT_WIDE, EAGER, COMPILED, OWN_WIDE}


def test_the_page_says_which_goals_the_model_sees_missed() -> None:
    """The goals are those that the comparisons are held to."""
    lines = lora_model.goal_lines(lora_model.H200)
    page = (ROOT / "bench" / "results" / "lora-model.md").read_text(encoding="utf-8")
    assert len(lines) == 4 * 6
    for size, passes, rank, dropout, predicted, goal, said in lines:
        inputs, outputs = (int(number) for number in size.split(" x "))
        plan = replace(
            H200,
            inputs=inputs,
            outputs=outputs,
            rank=int(rank),
            p=0.1 if dropout == "yes" else 0.0,
            backward=passes == "both",
        )
        assert wanted(plan)[BARE][0] == pytest.approx(1 / float(goal), rel=1e-3)
        if abs(float(predicted) - float(goal)) > 0.006:
            assert (said == "met") == (float(predicted) < float(goal))
        assert f"| {' | '.join((size, passes, rank, dropout, predicted, goal, said))} |" in page
    assert {line[-1] for line in lines} == {"met", "**missed**"}


def test_a_comparison_at_a_tiny_size() -> None:
    pytest.importorskip("peft")

    def measure(alternation: Alternation) -> None:
        alternation.round()

    comparison = lora_comparisons.compare(PLAN, Stopwatch(CPU, 1), measure, without=(COMPILED,))
    assert comparison.left_out == []
    assert [case.name for case in comparison.cases] == [OWN, OWN_WIDE, BARE, EAGER, PEFT, PEFT_WIDE]
    assert comparison.baseline == BARE
    assert all(case.figures["microseconds"] > 0 for case in comparison.cases)
    assert PLAN.predicted() is None


def test_the_prediction_is_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    shape = lora_model.Shape(8192, 768, 768, 16)
    monkeypatch.setattr(lora_model.Forward, "best", property(lambda self: 0.0))  # an H200 has no choice
    seconds = (
        lora_model.forward(lora_model.H200, shape).fused + lora_model.backward(lora_model.H200, shape).own
    )
    assert replace(H200, rank=9).predicted() == pytest.approx(1e6 * seconds)
    three = lora_model.Shape(8192, 768, 2304, 16, True, 3)
    qkv = QkvPlan(8192, 768, 768, 16, 0.1, torch.device("cuda"), torch.bfloat16, backward=False)
    assert qkv.predicted() == pytest.approx(1e6 * lora_model.forward(lora_model.H200, three).fused)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert H200.predicted() is None


def test_the_bench_itself_runs_small(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/test_lora.py", "-q", "-p", "no:cacheprovider"]
    chosen = ["--repeats", "1", "-k", "test_both", "--device", "cpu", "--results", str(tmp_path)]
    done = subprocess.run(
        [*command, *chosen],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora, 64x96, rank 16, dropout 0.1, 64 tokens, forward and backward" in done.stdout
    assert list(tmp_path.iterdir()) == []  # a CPU's figures are not recorded


# ---- the check of the kernels ----


SMALL = [case for case in lora_check.quick_cases() if case.rows < 500]
CUDA = torch.device("cuda")


def test_the_check_runs_on_a_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_check, "quick_cases", lambda: SMALL)
    assert lora_check.main(["--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{len(SMALL)} of {len(SMALL)} cases") == len(lora_check.DTYPES)
    assert "every error found is within the rule" in said


def test_the_check_says_that_time_ran_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora_check.main(["--quick", "--device", "cpu", "--seconds", "0"]) == 1
    assert "OUT OF TIME: 45 calls were not checked" in capsys.readouterr().out


def test_the_check_says_that_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lora_check.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


PARTS = [
    (None, [], (9, 0), "without nvcc|not built"),
    (object(), ["sm_80"], (9, 0), "without nvcc|not built"),
    (HostExtension(), ["sm_80"], (9, 0), "capability 9.0, and the extension was built for sm_80"),
    (HostExtension(), ["sm_80", "compute_90"], (9, 0), "built for sm_80, compute_90, without sm_90a"),
    (HostExtension(), ["sm_80", "sm_90a"], (7, 5), "capability 7.5, and the extension was built for"),
    (HostExtension(), ["sm_80", "sm_90a"], (9, 0), None),
    (HostExtension(), ["sm_80"], (8, 6), None),
]


@pytest.mark.parametrize(("functions", "architectures", "capability", "message"), PARTS)
def test_a_gpu_without_kernels_for_it_is_not_passed(
    functions: object,
    architectures: list[str],
    capability: tuple[int, int],
    message: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(extension, "part", lambda name: functions)
    monkeypatch.setattr(extension, "architectures", lambda: architectures)
    monkeypatch.setattr(extension, "capability", lambda device: capability)
    found = lora_check.problem(CUDA)
    if message is None:
        assert found is None
        kernels = {kernel for kernel, _ in lora_check.served(CUDA)}
        assert kernels == set(lora_check.KERNELS[2 if capability != (9, 0) else 0 :])
        return
    assert found is not None
    assert re.search(message, found)
    assert lora_check.main([]) == 3
    assert gpu.main(["--output", str(tmp_path / "out"), "--set", "lora"]) == 3
    assert capsys.readouterr().err.count("nothing was run") == 2
    assert not (tmp_path / "out").exists()


def reached(cases: list[lora_check.Case]) -> set[str]:
    """The kernels that the check runs, in forward and backward, on a GPU that has all of them."""
    found: set[str] = set()
    for case in cases:
        blocks, rank = len(case.ranks), next(r for r in (8, 16, 32, 64) if r >= max(case.ranks))
        for kernel in lora_check.KERNELS:
            family, _, split = kernel.partition("_")
            for element in ("BF16", "FP16", "float"):
                if family == "sm90" and element == "float":
                    continue
                found |= forward_variant(
                    family, element, case.rows, case.outputs, blocks, rank, case.dropout, bool(split)
                )
                found.add(input_variant(family, element, case.rows, case.inputs))
                found |= thin_variants(element, blocks, rank)
    return found


def test_the_check_runs_every_kernel_that_is_compiled() -> None:
    assert EVERY_KERNEL - reached(lora_check.quick_cases()) == set()
    for dropout in (False, True):
        alike = [case for case in lora_check.cases() if case.dropout == dropout]
        # Those for calls without dropout, or with it, are other kernels.
        other = {
            name
            for name in EVERY_KERNEL
            if re.search(rf"sm80 forward_kernel \w+ [1-9]\d* {int(not dropout)}", name)
        }
        assert EVERY_KERNEL - other - reached(alike) == set()
    quick = lora_check.quick_cases()
    assert any(case.rows <= 128 for case in quick)  # one block in a cluster
    assert any(case.bounds for case in quick)


def test_the_check_covers_the_design() -> None:
    cases = lora_check.cases()
    assert {1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 512} <= {case.rows for case in cases}
    assert {384, 768, 1024} <= {case.inputs for case in cases}
    assert {1, 4, 8, 16, 32, 64} <= {rank for case in cases for rank in case.ranks}
    assert {1, 3} == {len(case.ranks) for case in cases}
    assert any(case.bounds for case in cases)
    assert any(not case.dropout for case in cases)


class Recording(HostExtension):
    """Notes the kernel that is asked for."""

    def lora_forward(self, *, kernel: str, **given: Any) -> None:
        super().lora_forward(**given)
        self.calls.append(("forward", {"kernel": kernel}))

    def lora_input(self, *, kernel: str, **given: Any) -> None:
        super().lora_input(**given)
        self.calls.append(("input", {"kernel": kernel}))


@pytest.mark.parametrize("kernel", lora_check.KERNELS)
@pytest.mark.parametrize("dtype", lora_check.DTYPES)
def test_the_check_forces_a_kernel(kernel: str, dtype: torch.dtype) -> None:
    """All that the check compares with PyTorch's results, and the rows beyond 2^31 elements."""
    functions = Recording()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with extension.cuda_stand_in(functions), dispatch.use_backend("cuda"):
            for case in SMALL[:3]:
                assert lora_check.worst_error(case, dtype, CPU, kernel) <= 1.0
                assert len(functions.calls) > 0
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    asked = {(name, given["kernel"]) for name, given in functions.calls if "kernel" in given}
    assert asked == {("forward", kernel), ("input", kernel.removesuffix("_split"))}


@pytest.mark.parametrize("kernel", lora_check.KERNELS)
def test_the_rows_beyond_2_31_elements_are_a_kernel_s(kernel: str) -> None:
    case = lora_check.Case(700, 64, 72, (8,))
    functions = Recording()
    with extension.cuda_stand_in(functions):
        assert lora_check.beyond_2_31(CPU, kernel, case, 100) == 0
    asked = [(name, given["kernel"]) for name, given in functions.calls if "kernel" in given]
    assert asked == [("forward", kernel), ("input", kernel.removesuffix("_split"))] * 2

    class Overflowing(Recording):
        """Leaves the last rows of great tensors alone."""

        def lora_input(self, **given: Any) -> None:
            super().lora_input(**{**given, "rows": min(given["rows"], 650)})

    with extension.cuda_stand_in(Overflowing()):
        assert lora_check.beyond_2_31(CPU, kernel, case, 100) == float("inf")


def test_the_check_sees_an_error() -> None:
    class Wrong(HostExtension):
        def lora_grad_a(self, **given: Any) -> None:
            super().lora_grad_a(**{**given, "site": given["site"] + 1})

    case = SMALL[0]
    with extension.cuda_stand_in(Wrong()), dispatch.use_backend("cuda"):
        assert lora_check.worst_error(case, torch.bfloat16, CPU, None) > 1.0

    class Idle(HostExtension):
        def lora_input(self, **given: Any) -> None:
            pass

    with extension.cuda_stand_in(Idle()), dispatch.use_backend("cuda"):
        assert lora_check.worst_error(case, torch.bfloat16, CPU, None) == float("inf")

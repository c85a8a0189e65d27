"""The choice of an implementation, and what the extension says of itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mtbert.errors import ConfigError
from mtbert.kernels import dispatch, extension


def test_auto_always_finds_one() -> None:
    with dispatch.use_backend("auto"):
        for device in ("cpu", "cuda", "mps"):
            for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                for explanation in dispatch.explain(device, dtype):
                    assert explanation.implementation is not None, explanation


def test_float64_and_odd_shapes_go_to_the_reference() -> None:
    with dispatch.use_backend("auto"):
        assert dispatch.select("attention", device="cpu", dtype=torch.float64)[0] == "reference"
        assert dispatch.select("attention", device="cpu", dtype=torch.float32, head_dim=20)[0] == "reference"
        _, reason = dispatch.select("attention", device="cpu", dtype=torch.float64, head_dim=64)
    assert "the dtype must be float32 or bfloat16" in reason or extension.problem


def test_the_extension_serves_when_it_is_there(cpu_kernels: None) -> None:
    for operation in ("dropout", "attention", "embedding", "add_layer_norm", "bias_gelu"):
        for dtype in (torch.float32, torch.bfloat16):
            assert dispatch.select(operation, device="cpu", dtype=dtype)[0] == "cpu"


def test_an_explicit_choice_that_cannot_serve_raises(cpu_kernels: None) -> None:
    with pytest.raises(
        ConfigError, match=r"kernels=cpu cannot serve attention for float64 on cpu.*dtype must be"
    ):
        dispatch.select("attention", device="cpu", dtype=torch.float64)
    with (
        dispatch.use_backend("cuda"),
        pytest.raises(
            ConfigError, match="kernels=cuda cannot serve attention for float64 on cuda: not triton"
        ),
    ):
        dispatch.select("attention", device="cuda", dtype=torch.float64)


@pytest.mark.parametrize("chosen", ["cuda", "triton"])
def test_each_reason_is_given_once(chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with dispatch.use_backend(chosen):
        with pytest.raises(ConfigError) as caught:
            dispatch.serving("cpu", torch.float32)
        missing = [row for row in dispatch.explain("cpu", torch.float32) if row.implementation is None]
    lines = str(caught.value).split("\n")
    assert len(lines) == len({row.reason for row in missing}) < len(missing)
    named = [line.partition(" cannot serve ")[2].partition(" for float32 on cpu: ") for line in lines]
    expected: dict[str, list[str]] = {}
    for row in missing:
        expected.setdefault(row.reason, []).append(row.operation)
    assert {reason: operations.split(", ") for operations, _, reason in named} == expected
    assert "attention, softmax" in str(caught.value)


def test_what_serves_is_named(cpu_kernels: None) -> None:
    with dispatch.use_backend("cpu"):
        served = dispatch.serving("cpu", torch.float32)
    assert list(served) == ["dropout", "attention", *list(dispatch.OPERATIONS)[2:]]
    assert served["dropout"] == "cpu"


def test_the_extension_s_absence_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_module", None)
    with dispatch.use_backend("cpu"), pytest.raises(ConfigError, match=r"cannot serve dropout.*mtbert\._C"):
        dispatch.select("dropout", device="cpu", dtype=torch.float32)
    with dispatch.use_backend("auto"):
        assert dispatch.select("dropout", device="cpu", dtype=torch.float32)[0] == "reference"


def test_names_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'fast' is no kernel backend, expected one of auto, reference"):
        dispatch.set_backend("fast")
    with pytest.raises(ValueError, match="unknown operation 'conv'"):
        dispatch.select("conv", device="cpu", dtype=torch.float32)
    dispatch.set_backend(None)
    monkeypatch.setenv("MTBERT_KERNELS", "quick")
    with pytest.raises(ConfigError, match="MTBERT_KERNELS: 'quick'"):
        dispatch.backend()
    monkeypatch.setenv("MTBERT_KERNELS", "reference")
    assert dispatch.backend() == "reference"


def test_another_name_of_the_package_is_refused() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from kernels import attention"
    root = os.path.dirname(os.path.dirname(dispatch.__file__))
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert "this package is mtbert.kernels and was imported as 'kernels'" in done.stderr


def test_transformers_does_not_take_the_folder_for_a_package_of_that_name() -> None:
    pytest.importorskip("transformers")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from transformers import BertModel\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "assert not is_kernels_available()"
    )
    root = os.path.dirname(os.path.dirname(dispatch.__file__))
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_RAISES = """
import mtbert.kernels.extension as e
try:
    e.cpu().instruction_set()
except ValueError as error:
    print(error)
"""


def test_the_environment_chooses_the_instruction_set(cpu_kernels: None) -> None:
    def run(code: str, name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "MTBERT_CPU_ISA": name},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    ask = "import mtbert.kernels.extension as e; print(e.cpu().instruction_set())"
    assert run(ask, "baseline") == "baseline"
    assert run(ask, "") == extension.cpu().instruction_sets()[0]
    assert run(_RAISES, "avx9").startswith(
        "MTBERT_CPU_ISA: this processor and build have no instruction set 'avx9'"
    )


# The child touches no operation of PyTorch, whose own threads do not survive a fork.
_FORKS = """
import os, sys, torch
from mtbert.kernels import extension

x, out, rows = torch.ones(400, 400), torch.zeros(400, 400), torch.arange(400, dtype=torch.int32)

def run():
    extension.cpu().dropout(
        x=x.data_ptr(), out=out.data_ptr(), rows=400, columns=400, dtype="float32", threads=2,
        dropout_row=rows.data_ptr(), seed=1, step=2, site=3, threshold=6554,
    )
    return out.numpy().tobytes()

before = run()
child = os.fork()
if child == 0:
    ok = extension.cpu().thread_source() == "own" and all(run() == before for _ in range(3))
    os._exit(0 if ok else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes(cpu_kernels: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FORKS], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("dropout", {"rows": -1}, "rows must be at least 0"),
        ("dropout", {"x": 0}, "x must not be null"),
        ("dropout", {"x": 3}, "x must be aligned"),
        ("dropout", {"dtype": "float16"}, "dtype must be float32 or bfloat16"),
        ("dropout", {"threads": 0}, "threads must be 1 to 1024"),
        ("dropout", {"threshold": 70000}, "threshold must be 0 to 65535"),
        ("dropout", {"step": -1}, "step must be in"),
        ("dropout", {"dropout_row": 0}, "dropout_row must not be null"),
    ],
)
def test_the_extension_checks_its_arguments(
    cpu_kernels: None, function: str, change: dict[str, object], message: str
) -> None:
    x, rows = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32)
    arguments = {
        "x": x.data_ptr(),
        "out": x.data_ptr(),
        "rows": 2,
        "columns": 4,
        "dtype": "float32",
        "threads": 1,
        "dropout_row": rows.data_ptr(),
        "seed": 0,
        "step": 0,
        "site": 0,
        "threshold": 100,
    }
    with pytest.raises(ValueError, match=f"{function}: {message}"):
        getattr(extension.cpu(), function)(**(arguments | change))

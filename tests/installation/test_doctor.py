"""`python -m mtbert.doctor`: exit codes and what it says of a missing, a broken and a wrong installation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtbert
from mtbert import doctor, installation, parity
from mtbert.doctor import Finding
from mtbert.installation import runs_on

PACKAGE = Path(mtbert.__file__).parent
PARITY = "Parity with the reference"


# An editable install finds mtbert._C and mtbert.kernels in its checkout whatever the current folder holds, so the
# doctor of a copy runs without its finder.
ISOLATED = """
import runpy, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__.startswith("_frozen_importlib")]
runpy.run_module("mtbert.doctor", run_name="__main__", alter_sys=True)
"""


def run_doctor(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MTBERT_KERNELS"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120, env=environment
    )


def findings(done: subprocess.CompletedProcess[str], section: str) -> dict[str, dict[str, str]]:
    return {finding["subject"]: finding for finding in json.loads(done.stdout)["sections"][section]}


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no extension."""
    ignored = shutil.ignore_patterns("_C*", installation.RECORD_NAME, "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mtbert", ignore=ignored)
    kernels = Path(parity.kernels.__file__).parent
    shutil.copytree(kernels, tmp_path / "mtbert" / "kernels", ignore=ignored, dirs_exist_ok=True)
    return tmp_path


def test_this_installation_is_whole(tmp_path: Path) -> None:
    done = run_doctor(["-m", "mtbert.doctor", "--json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    assert list(report["sections"]) == list(doctor.SECTIONS)
    statuses = {finding["status"] for section in report["sections"].values() for finding in section}
    assert statuses <= {"ok", "note", "warning"}
    assert findings(done, "Kernels that would serve").keys() >= {"dropout", "attention", "linear"}
    assert report["sections"][PARITY]


def test_missing_extension_is_a_warning_with_its_reason(copied_package: Path) -> None:
    problem = {"missing": "extension", "why": "no C++ compiler: because of this test", "then": ""}
    record = {installation.extension_suffix(): {"extension": None, "problems": [problem]}}
    (copied_package / "mtbert" / installation.RECORD_NAME).write_text(json.dumps(record))
    done = run_doctor(["-c", ISOLATED, "--json"], copied_package)
    assert done.returncode == 0, done.stdout + done.stderr
    finding = findings(done, "Extension")["mtbert._C"]
    assert finding["status"] == "warning"
    assert "no C++ compiler: because of this test" in finding["text"]
    assert "RuntimeWarning: mtbert runs without its C++ and CUDA kernels: no C++ compiler" in done.stderr
    assert findings(done, "Kernels that would serve")["dropout"]["text"].startswith("reference")


def test_broken_extension_is_named_without_a_traceback(copied_package: Path) -> None:
    (copied_package / "mtbert" / f"_C{installation.extension_suffix()}").write_bytes(b"not a library")
    done = run_doctor(["-c", ISOLATED], copied_package)
    assert done.returncode == 1
    assert "broken" in done.stdout
    assert "is there but cannot be imported" in done.stdout
    assert "Nothing is broken" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_kernel_that_is_wrong_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = parity.kernels.linear
    monkeypatch.setattr(parity.kernels, "linear", lambda x, weight, bias: right(x, weight, bias) * 1.1)
    found = [finding for finding in doctor.parity() if finding.subject == "linear"]
    assert found
    assert all(finding.status == "broken" for finding in found)
    assert all(" is off by " in finding.text for finding in found)


def test_a_kernel_that_raises_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of cheese\nand more")

    monkeypatch.setattr(parity.kernels, "linear", fail)
    found = [finding for finding in doctor.parity() if finding.subject == "linear"]
    assert {finding.status for finding in found} == {"broken"}
    assert found[0].text.endswith("RuntimeError: out of cheese")


def test_old_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.9.1+cpu")
    finding = next(finding for finding in doctor.versions() if finding.subject == "torch")
    assert finding.status == "broken"
    assert "2.9.1+cpu is too old" in finding.text


def test_an_unforeseen_failure_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(
        doctor, "SECTIONS", {"First": fail, "Second": lambda: iter([Finding("ok", "a", "b")])}
    )
    report = doctor.examine()
    assert report["First"] == [Finding("broken", "check", "could not finish: OSError: the disk is on fire")]
    assert report["Second"] == [Finding("ok", "a", "b")]
    assert doctor.render(report).endswith("1 broken, 0 warnings.")


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100f", (10, 3), True),
        ("sm_90a", (10, 0), False),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
    ],
)
def test_which_gpus_a_target_serves(target: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(target, *capability) is runs


def test_missing_package_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["torch>=2.10", "numpy", "no-such-package>=1", 'no-such-tool; extra == "test"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: named)
    found = {finding.subject: finding.status for finding in doctor.versions()}
    assert found["numpy"] == "ok"
    assert found["no-such-package"] == "broken"
    assert "no-such-tool" not in found


def test_a_checkout_that_is_not_installed_says_how_to_install(copied_package: Path) -> None:
    shutil.rmtree(copied_package / "mtbert" / "kernels")
    done = run_doctor(["-c", ISOLATED], copied_package)
    assert done.returncode != 0
    assert "ImportError: mtbert is not installed" in done.stderr
    assert "pip install -e ." in done.stderr


def test_kernels_of_another_copy_are_noticed(copied_package: Path) -> None:
    shutil.rmtree(copied_package / "mtbert" / "kernels")
    done = run_doctor(["-c", "import mtbert"], copied_package)
    assert "RuntimeWarning: mtbert comes from" in done.stderr
    assert "another copy" in done.stderr

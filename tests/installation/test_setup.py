"""setup.py: an install without compilers succeeds and says so; what it finds, and what a package holds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import mtbert
from mtbert import installation

ROOT = Path(mtbert.__file__).parent.parent

pytest.importorskip("setuptools", minversion="77")
if not (ROOT / "setup.py").is_file():
    pytest.skip("not a checkout", allow_module_level=True)


@pytest.fixture
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mtbert_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an install needs, never built."""
    for name in ("csrc", "kernels", "mtbert"):
        ignored = shutil.ignore_patterns("_C*", installation.RECORD_NAME, "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MTBERT_")}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_compiler_the_install_succeeds_and_says_so(checkout: Path) -> None:
    stale = checkout / "mtbert" / f"_C{installation.extension_suffix()}"
    stale.write_bytes(b"of older sources")
    done = build(checkout, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "WARNING: mtbert is installed without its compiled extension" in done.stderr
    assert "CXX names '/nonexistent/c++', which cannot be run" in done.stderr
    assert "Everything works" in done.stderr
    assert not stale.exists()
    record = installation.build_record(checkout / "mtbert")
    assert record is not None
    assert record["extension"] is None
    reason = installation.missing_extension(checkout / "mtbert")
    assert reason == "no C++ compiler: CXX names '/nonexistent/c++', which cannot be run"


def test_a_required_build_fails_without_a_compiler(checkout: Path) -> None:
    done = build(checkout, CXX="/nonexistent/c++", MTBERT_BUILD="required")
    assert done.returncode != 0
    assert "MTBERT_BUILD=required: mtbert._C could not be built: no C++ compiler" in done.stderr
    assert installation.build_record(checkout / "mtbert") is None


def test_records_of_several_pythons_live_together(checkout: Path) -> None:
    path = checkout / "mtbert" / installation.RECORD_NAME
    path.write_text(json.dumps({".another-python.so": {"problems": []}}))
    assert build(checkout, CXX="/nonexistent/c++").returncode == 0
    assert json.loads(path.read_text()).keys() == {".another-python.so", installation.extension_suffix()}


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_where_nvcc_is_looked_for(
    setup_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "MTBERT_CUDA"):
        monkeypatch.delenv(name, raising=False)
    on_path = executable(tmp_path / "path" / "nvcc")
    at_home = executable(tmp_path / "home" / "bin" / "nvcc")
    named = executable(tmp_path / "named-nvcc")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert setup_module.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_module.find_nvcc() == str(at_home)
    monkeypatch.setenv("CUDACXX", str(named))
    assert setup_module.find_nvcc() == str(named)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "gone"))
    with pytest.raises(setup_module.BuildError, match="CUDACXX names"):
        setup_module.find_nvcc()
    monkeypatch.setenv("MTBERT_CUDA", "0")
    with pytest.raises(setup_module.BuildError, match="switched off by MTBERT_CUDA=0"):
        setup_module.find_nvcc()


@pytest.mark.parametrize(
    ("listed", "targets"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("9.0a, 8.0", ["sm_90a", "sm_80", "compute_90"]),
        ("75;120f 100", ["sm_75", "sm_120f", "sm_100", "compute_120"]),
    ],
)
def test_cuda_targets(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, listed: str, targets: list[str]
) -> None:
    monkeypatch.setenv("MTBERT_CUDA_ARCHS", listed)
    assert setup_module.cuda_targets() == targets


@pytest.mark.parametrize("listed", ["hopper", "80;9x", ";"])
def test_impossible_cuda_targets_are_named(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, listed: str
) -> None:
    monkeypatch.setenv("MTBERT_CUDA_ARCHS", listed)
    with pytest.raises(setup_module.BuildError, match="MTBERT_CUDA_ARCHS"):
        setup_module.cuda_targets()


def test_spills_are_read_from_what_ptxas_prints(setup_module: ModuleType) -> None:
    log = """
ptxas info    : Compiling entry function '_Zgood' for 'sm_80'
ptxas info    : Function properties for _Zgood
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
ptxas info    : Compiling entry function '_Zbad' for 'sm_90a'
ptxas info    : Function properties for _Zbad
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
"""
    assert setup_module.spilled_bytes(log) == {"sm_80 _Zgood": 0, "sm_90a _Zbad": 20}


def test_a_failure_is_told_by_its_first_error(setup_module: ModuleType, tmp_path: Path) -> None:
    script = "echo 'fine so far'; echo 'a.cpp:1: error: no such thing'; echo later; exit 3"
    log = tmp_path / "build.log"
    with pytest.raises(setup_module.BuildError) as caught:
        setup_module.run(["sh", "-c", script], log)
    assert str(caught.value) == f"sh failed ({log} has all of it):\na.cpp:1: error: no such thing\nlater"
    assert "fine so far" in log.read_text()


def test_every_module_is_in_a_package_that_is_installed(setup_module: ModuleType) -> None:
    packages = set(setup_module.find_all_packages())
    for folder, package in (("mtbert", "mtbert"), ("kernels", "mtbert.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.parent.relative_to(ROOT / folder).parts
            assert ".".join((package, *inside)) in packages, f"{path} would not be in a wheel"


def test_every_preset_is_package_data() -> None:
    kept = {
        path.relative_to(ROOT / "mtbert")
        for pattern in ("presets/*.yaml", "presets/papers/*.yaml", "sweeps/spaces/*.yaml")
        for path in (ROOT / "mtbert").glob(pattern)
    }
    others = {
        path.relative_to(ROOT / "mtbert")
        for path in (ROOT / "mtbert").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so") and path.name != "py.typed"
    }
    assert others - {Path(installation.RECORD_NAME)} == kept

"""The record of what a run ran on."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mtbert.engine.environment import code_version, device_name, environment, environment_differences


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_a_clean_checkout_and_a_dirty_one(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert len(commit) == 12
    (checkout / "notes.txt").write_text("untracked files are no change of the code")
    assert code_version(checkout / "code.py") == commit
    (checkout / "code.py").write_text("a = 2\n")
    assert code_version(checkout / "code.py") == f"{commit}-dirty"
    git(checkout, "add", "code.py")
    assert code_version(checkout / "code.py") == f"{commit}-dirty"


def test_code_that_only_lies_inside_of_a_foreign_checkout(checkout: Path) -> None:
    (checkout / "venv").mkdir()
    (checkout / "venv" / "code.py").write_text("")
    assert code_version(checkout / "venv" / "code.py").startswith("mtbert ")


def test_no_checkout_or_no_commit_or_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_version(tmp_path / "code.py").startswith("mtbert ")
    if shutil.which("git") is not None:
        git(tmp_path, "init")
        assert code_version(tmp_path / "code.py").startswith("mtbert ")
    monkeypatch.setenv("PATH", "")
    assert code_version(tmp_path / "code.py").startswith("mtbert ")


def test_the_record() -> None:
    record = environment("cpu")
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) == {"python", "torch", "numpy", "tokenizers", "safetensors", "mtbert"}
    assert record["threads"] == torch.get_num_threads()
    assert record["git"]
    assert record["device"]
    assert record["device"] == device_name(torch.device("cpu"))
    assert environment_differences(record, environment("cpu")) == []


def test_the_differences_that_matter() -> None:
    then = environment("cpu")
    versions = {**then["versions"], "torch": "0"}
    now = {**then, "threads": then["threads"] + 1, "created": "later", "versions": versions}
    assert environment_differences(then, now) == [
        f"threads: {then['threads']} then, {then['threads'] + 1} now",
        f"version of torch: {torch.__version__} then, 0 now",
    ]
    assert (
        environment_differences(then, then | {"ranks": 1}) == []
    )  # a record from before there could be several
    assert environment_differences(then, then | {"ranks": 2}) == ["ranks: 1 then, 2 now"]

"""A run's folder: new ones, ones refused with a useful word, files written as a whole, and the lock."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.small_disk import small_disk

import mtbert.engine.durable as durable
from mtbert.engine.run_folder import RunFolder
from mtbert.errors import UserError


def test_a_new_folder_is_named_after_date_time_and_hint(tmp_path: Path) -> None:
    run = RunFolder.create(None, "sst-para sts/ä", parent=tmp_path / "runs")
    assert re.fullmatch(r"\d{8}-\d{6}-sst-para-sts", run.name)
    assert run.path.is_dir()
    run.close()


@pytest.mark.parametrize("hint", ["", "..", "///"])
def test_a_hint_without_letters(tmp_path: Path, hint: str) -> None:
    with RunFolder.create(None, hint, parent=tmp_path) as run:
        assert run.name.endswith("-run")
        assert run.path.parent == tmp_path


def test_new_folders_of_the_same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.engine.run_folder.time.strftime", lambda *arguments: "20250101-120000")
    names = []
    for _ in range(3):
        with RunFolder.create(None, "x", parent=tmp_path) as run:
            names.append(run.name)
    assert names == ["20250101-120000-x", "20250101-120000-x-2", "20250101-120000-x-3"]


def test_another_process_that_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtbert.engine.run_folder.time.strftime", lambda *arguments: "20250101-120000")
    real = Path.mkdir

    def raced(path: Path, *arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(Path, "mkdir", real)
        path.mkdir(parents=True)
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", raced)
    with RunFolder.create(None, "x", parent=tmp_path) as run:
        assert run.name == "20250101-120000-x-2"


def test_the_layout(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", "") as run:
        paths = [run.config_path, run.metrics_path, run.log_path, run.record_path, run.report_path]
        paths += [run.checkpoints, run.predictions, run.plots]
        assert {path.parent for path in paths} == {run.path}
        assert [path.name for path in paths] == [
            *("config.yaml", "metrics.jsonl", "log.txt", "run.json", "report.md"),
            *("checkpoints", "predictions", "plots"),
        ]
        assert run.name == "run"


def test_an_empty_folder_and_one_with_foreign_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder.create(str(tmp_path), "") as run:
        assert run.path == tmp_path
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_second_try_of_a_run_that_got_no_further_than_its_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("no such data")
    RunFolder.create(tmp_path, "").close()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "checkpoints", "report.md"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        RunFolder.create(tmp_path, "")
    for part in (str(tmp_path), name, f"--resume {tmp_path}", "--output"):
        assert part in str(caught.value)
    (tmp_path / name).rmdir()
    RunFolder.create(tmp_path, "").close()  # the lock was given back


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="is a file; --output must name a folder"):
        RunFolder.create(tmp_path / "x", "")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        RunFolder.create(tmp_path / "x" / "y", "")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.open(tmp_path / "x")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be made: File name too long"):
        RunFolder.create(tmp_path / ("x" * 300), "")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("mtbert.engine.folder_lock.os.open", refuse)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        RunFolder.create(tmp_path, "")


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run's folder"):
        RunFolder.open(tmp_path / "runs" / "x")
    run = tmp_path / "runs" / "first-try"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"did you mean .*first-try"):
        RunFolder.open(tmp_path / "runs" / "frist-try")
    with pytest.raises(UserError, match=r"no config.yaml.*the newest run below it is .*first-try"):
        RunFolder.open(tmp_path / "runs")
    assert RunFolder.open(str(run)).path == run


# ---- files


def test_files_are_written_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.write_text(run.report_path, "old, ä\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "sync_file", full)
    with pytest.raises(UserError, match=r"report.md cannot be written: No space left on device"):
        run.write_text(run.report_path, "new")
    assert run.report_path.read_bytes() == "old, ä\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.md"]


def test_the_old_file_is_there_until_the_new_one_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.write_text(run.report_path, "old")
    seen = []

    def look(source: Path, target: Path) -> None:
        seen.append((source.read_text(), target.read_text()))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", look)
    with pytest.raises(UserError, match="Input/output error"):
        run.write_text(run.report_path, "new")
    assert seen == [("new", "old")]
    assert run.report_path.read_text() == "old"


def test_files_on_a_real_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="64k") as disk:
        run = RunFolder(disk)
        run.write_text(run.report_path, "old")
        with pytest.raises(UserError, match="No space left on device"):
            run.write_text(run.report_path, "new" * 100_000)
        assert run.report_path.read_text() == "old"
        assert [entry.name for entry in disk.iterdir()] == ["report.md"]


def test_json_comes_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_json(run.predictions / "x.json", {"a": [1, 2.5, None], "naïve": float("nan")})
    text = (run.predictions / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [1, 2.5, None], "naïve": None}
    assert "naïve" in text


# ---- the lock

_HOLD = "import sys, time; from mtbert.engine.run_folder import RunFolder; from pathlib import Path\n"
_HOLD += "RunFolder(Path(sys.argv[1])).lock(); print('locked', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_until_the_first_has_ended_even_by_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "locked\n"
            for attempt in (lambda: RunFolder(tmp_path).lock(), lambda: RunFolder.create(tmp_path, "")):
                with pytest.raises(UserError, match=rf"is in use by process {first.pid} on .* since "):
                    attempt()
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
    with RunFolder(tmp_path).lock() as run:
        assert f"process {os.getpid()} on" in (run.path / ".lock").read_text()


def test_locking_twice_is_once_and_closing_gives_back(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path), RunFolder(tmp_path)
    assert one.lock().lock() is one
    with pytest.raises(UserError, match="in use"):
        two.lock()
    one.close()
    one.close()
    with two.lock():
        pass
    one.lock().close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only a fork shares open files")
def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).lock()
    reading, writing = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.write(tell, b"here")
        os.read(reading, 1)  # waits until the parent closes its end
        os._exit(0)
    os.close(reading)
    os.read(told, 4)
    try:
        run.close()
        RunFolder(tmp_path).lock().close()
    finally:
        for descriptor in (writing, told, tell):
            os.close(descriptor)
        os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only a fork shares open files")
def test_a_forked_worker_that_ends_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).lock()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(UserError, match="in use"):
        RunFolder(tmp_path).lock()
    run.close()


def test_a_volume_without_locks_grants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    RunFolder(tmp_path).lock().close()


def test_a_launch_finds_the_folder_that_it_began(tmp_path: Path) -> None:
    """What a restart by torchrun goes by: its own folder, not one of an earlier launch, whatever the output."""
    with RunFolder.create(None, "sst", parent=tmp_path, launch="one") as first:
        pass
    with RunFolder.create(tmp_path / "named", "", launch="two"), pytest.raises(UserError, match="in use"):
        RunFolder.create(tmp_path / "named", "", launch="two")
    found = RunFolder.of_launch("one", None, parent=tmp_path)
    assert found is not None
    assert found.path == first.path
    assert RunFolder.of_launch("one", tmp_path / "named") is None
    named = RunFolder.of_launch("two", tmp_path / "named")
    assert named is not None
    assert named.path == tmp_path / "named"
    assert RunFolder.of_launch("three", None, parent=tmp_path) is None
    assert RunFolder.of_launch(None, tmp_path / "named") is None

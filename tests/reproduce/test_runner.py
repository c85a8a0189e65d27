"""Running jobs with a training that is quick: what is skipped, resumed, noted and stopped."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtbert.engine.reproduction import Job, Runner, failure_reason
from mtbert.errors import Interrupted

TRAIN = textwrap.dedent(
    """
    import os, pathlib, signal, sys, time
    arguments = sys.argv[1:]
    if arguments[0] == "--resume":
        folder, kind = pathlib.Path(arguments[1]), "resumed"
    else:
        kind, folder = arguments[0], pathlib.Path(arguments[1])
    (folder / "calls.txt").open("a").write(kind + "\\n")
    if kind == "bad":
        print("loading")
        print("error: sst.head: no such thing", file=sys.stderr)
        sys.exit(2)
    if kind == "quiet":
        sys.exit(3)
    if kind == "crash":
        print("Traceback (most recent call last):")
        raise RuntimeError("shapes differ")
    (folder / "config.yaml").write_text("epochs: 1")
    if kind == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "slow":
        def stop(*_):
            (folder / "calls.txt").open("a").write("stopped\\n")
            sys.exit(130)
        signal.signal(signal.SIGTERM, stop)
        (folder / "ready").touch()
        time.sleep(60)
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "report.md").write_text("done")
    """
)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    return Runner((sys.executable, str(script)))


def job(folder: Path, kind: str) -> Job:
    return Job(kind, 0, folder / kind, (kind, str(folder / kind)))


def calls(job: Job) -> list[str]:
    file = job.folder / "calls.txt"
    return file.read_text().split() if file.is_file() else []


def test_done_jobs_are_skipped_and_failures_are_noted_while_the_rest_goes_on(
    runner: Runner, tmp_path: Path
) -> None:
    jobs = [job(tmp_path, kind) for kind in ("done", "bad", "crash", "memory", "good")]
    jobs[0].folder.mkdir()
    (jobs[0].folder / "report.md").write_text("long ago")
    seen: list[str] = []
    runner.run(jobs, lambda job, seconds: seen.append(job.row))
    assert seen == ["bad", "crash", "memory", "good"]
    assert calls(jobs[0]) == []
    assert [job.failure for job in jobs] == [
        None,
        "sst.head: no such thing",
        "RuntimeError: shapes differ",
        "killed by SIGKILL, as the system does when memory runs out",
        None,
    ]
    assert [job.done for job in jobs] == [True, False, False, False, True]
    assert not (jobs[4].folder / "checkpoints").exists()


def test_a_killed_job_is_resumed_and_a_failed_one_is_tried_again(runner: Runner, tmp_path: Path) -> None:
    jobs = [job(tmp_path, "memory"), job(tmp_path, "bad")]
    runner.run(jobs, lambda job, seconds: None)
    runner.run(jobs, lambda job, seconds: None)
    assert calls(jobs[0]) == ["memory", "resumed"]
    assert jobs[0].done
    assert jobs[0].failure is None
    assert calls(jobs[1]) == ["bad", "bad"]
    kept = dataclasses.replace(runner, keep_checkpoints=True)
    last = job(tmp_path, "good")
    kept.run([last], lambda job, seconds: None)
    assert (last.folder / "checkpoints").is_dir()


def test_a_run_that_is_still_on_its_way_out_is_waited_for(runner: Runner, tmp_path: Path) -> None:
    held, other = job(tmp_path, "held"), job(tmp_path, "other")
    held.folder.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from mtbert.engine.folder_lock import FolderLock;"
        " FolderLock(Path(sys.argv[1])).acquire(); print(flush=True); time.sleep(1.5)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(held.folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen: list[str] = []
        runner.run([held, other], lambda job, seconds: seen.append(job.row))
    assert seen == ["other", "held"]


def test_only_the_last_attempt_is_blamed(runner: Runner, tmp_path: Path) -> None:
    first = job(tmp_path, "bad")
    runner.run([first], lambda job, seconds: None)
    again = dataclasses.replace(first, arguments=("quiet", str(first.folder)))
    runner.run([again], lambda job, seconds: None)
    assert again.failure == "ended with exit code 3 and said nothing"


def test_the_reason_of_a_failure() -> None:
    assert failure_reason(1, "") == "ended with exit code 1 and said nothing"
    assert failure_reason(-15, "error: old") == "killed by SIGTERM"
    assert failure_reason(2, "error: a\nerror: b\nlast") == "b"


def test_two_jobs_run_at_a_time(runner: Runner, tmp_path: Path) -> None:
    both = dataclasses.replace(runner, at_once=2)
    jobs = [Job(name, 0, tmp_path / name, ("slow", str(tmp_path / name))) for name in ("one", "two", "three")]
    with (
        _interrupt_when(lambda: all((job.folder / "ready").exists() for job in jobs[:2])),
        pytest.raises(Interrupted, match="stopped during one seed 0, two seed 0"),
    ):
        both.run(jobs, lambda job, seconds: None)
    assert [calls(job) for job in jobs] == [["slow", "stopped"], ["slow", "stopped"], []]
    assert [job.failure for job in jobs] == [None, None, None]
    runner.run(jobs[:2], lambda job, seconds: None)
    assert calls(jobs[0]) == ["slow", "stopped", "resumed"]


class _interrupt_when:
    """SIGINT for this process, as Ctrl-C, once a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.condition = condition

    def __enter__(self) -> None:
        def check(*_: object) -> None:
            if self.condition():
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt
            signal.setitimer(signal.ITIMER_REAL, 0.05)

        self.before = signal.signal(signal.SIGALRM, check)
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.before)


def test_a_training_stops_when_its_parent_is_killed(tmp_path: Path) -> None:
    """The watcher of `train_row`, with a training that only waits."""
    child = (
        "import sys, time; import mtbert.reproduce as r;"
        f" r.train.main = lambda a: (open({str(tmp_path / 'up')!r}, 'w').close(), time.sleep(60));"
        " r.train_row(int(sys.argv.pop(1)))"
    )
    parent = (
        "import os, subprocess, sys, time;"
        f" p = subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True);"
        f" open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    try:
        _wait(lambda: (tmp_path / "up").exists(), 60)
        pid = int((tmp_path / "pid").read_text())
        process.kill()
        process.wait()
        _wait(lambda: not _alive(pid), 15)
    finally:
        process.kill()
        process.wait()


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

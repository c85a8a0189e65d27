"""Many training runs, each in its own process: finished ones are skipped, killed ones resumed, failed ones noted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from mtbert.engine.durable import replace_file
from mtbert.engine.folder_lock import FolderLock
from mtbert.errors import Interrupted, UserError

CONSOLE = "console.txt"
FAILURE = "failure.json"
_TAIL = 20_000
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One run: a row with a seed, its folder, and the training options that begin it."""

    row: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def done(self) -> bool:
        """Whether the run is finished: its report is the last thing written."""
        return (self.folder / "report.md").is_file()

    @property
    def begun(self) -> bool:
        """Whether there is a run to go on with."""
        return (self.folder / "config.yaml").is_file()

    @property
    def failure(self) -> str | None:
        """Why the last attempt failed; None for a finished run or one that never failed."""
        if self.done:
            return None
        try:
            return str(json.loads((self.folder / FAILURE).read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __str__(self) -> str:
        return f"{self.row} seed {self.seed}"


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    console: IO[bytes]
    before: int
    """Bytes of earlier attempts in the console's file."""
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Runner:
    """Runs jobs, at most `at_once` at a time.

    train: the command that takes training options, such as (python, "-m", "mtbert.train"). threads: processor threads
    of each run, 0 for all. keep_checkpoints: whether finished runs keep theirs.
    """

    train: Sequence[str]
    at_once: int = 1
    threads: int = 0
    keep_checkpoints: bool = False

    def run(self, jobs: Sequence[Job], finished: Callable[[Job, float], None]) -> None:
        """Run what is not done; `finished(job, seconds)` is called after each job, failed ones included.

        Every failure is noted in the job's folder (`Job.failure`). On KeyboardInterrupt the runs are asked to stop with
        a checkpoint and waited for, then Interrupted is raised; a second one kills them.
        """
        waiting = [job for job in jobs if not job.done]
        running: list[_Running] = []
        try:
            while waiting or running:
                if len(running) < self.at_once:
                    # A run that somebody else trains, or that is still on its way out, is left for later.
                    waiting = [job for job in waiting if not job.done]
                    free = [job for job in waiting if not _in_use(job.folder)][: self.at_once - len(running)]
                    waiting = [job for job in waiting if job not in free]
                    running += [self._start(job) for job in free]
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    self._finish(entry)
                    finished(entry.job, time.monotonic() - entry.started)
                if running or waiting:
                    time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            _stop(running)
            for entry in running:
                entry.console.close()
            names = ", ".join(str(entry.job) for entry in running)
            raise Interrupted(
                f"stopped{' during ' + names if names else ''}; the same command goes on"
            ) from None
        except BaseException:
            _kill(running)
            raise

    def _start(self, job: Job) -> _Running:
        options = ("--resume", str(job.folder)) if job.begun else job.arguments
        environment = dict(os.environ)
        if self.threads:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / FAILURE).unlink(missing_ok=True)
            console = (job.folder / CONSOLE).open("ab")
            before = console.seek(0, os.SEEK_END)
        except OSError as error:
            raise UserError(f"{job.folder} cannot be written: {error.strerror or error}") from error
        process = subprocess.Popen(
            [*self.train, *options],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            # A session of its own: Ctrl-C in the terminal is for this process, which asks its runs to stop, once.
            start_new_session=True,
        )
        return _Running(job, process, console, before)

    def _finish(self, entry: _Running) -> None:
        entry.console.close()
        job, code = entry.job, entry.process.returncode
        if job.done:
            if not self.keep_checkpoints:
                shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
            return
        note = {"reason": failure_reason(code, _tail(job.folder / CONSOLE, entry.before)), "exit_code": code}
        note["time"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        with contextlib.suppress(OSError):  # a full disk must not end the other runs
            replace_file(job.folder / FAILURE, (json.dumps(note, indent=2) + "\n").encode())


def _in_use(folder: Path) -> bool:
    """Whether a process trains into `folder`."""
    if not folder.is_dir():
        return False
    lock = FolderLock(folder)
    try:
        return lock.acquire() is not None
    finally:
        lock.release()


def failure_reason(code: int, output: str) -> str:
    """One line that says why a run ended without a report. code: of the process, below 0 for a signal."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, as the system does when memory runs out"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
        return f"killed by signal {-code}"
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    return lines[-1] if lines else f"ended with exit code {code} and said nothing"


def _tail(path: Path, first: int) -> str:
    """The end of a file, from byte `first` on."""
    with path.open("rb") as file:
        file.seek(max(first, file.seek(0, os.SEEK_END) - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def _stop(running: Sequence[_Running]) -> None:
    """Ask for an end with a checkpoint, and wait for it; a KeyboardInterrupt meanwhile kills."""
    try:
        for entry in running:
            entry.process.terminate()
        for entry in running:
            entry.process.wait()
    except KeyboardInterrupt:
        _kill(running)


def _kill(running: Sequence[_Running]) -> None:
    for entry in running:
        entry.process.kill()
        entry.process.wait()

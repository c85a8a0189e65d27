"""Trainings in processes of their own that start in milliseconds: forked from one process that has the imports.

Importing PyTorch and the rest takes seconds, and a test that kills trainings needs many processes. Each training is a
real process with the command line of `python -m mtbert.train`; its parent is this module, run as a script.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_TIMEOUT = 60.0


class Training:
    """One running training. Its output goes into files, so that it never waits for a reader."""

    def __init__(self, server: TrainingServer, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self._server = server
        self._out, self._err = out, err
        self._code: int | None = None

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self._err.read_text(encoding="utf-8")

    def signal(self, number: int) -> None:
        """Send a signal. The process is not reaped before `wait`, so its id is never somebody else's."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def running(self) -> bool:
        """Whether the process has not ended yet."""
        if self._code is None:
            self._code = self._server.ask({"poll": self.pid})
        return self._code is None

    def wait(self) -> int:
        """The exit code; minus the signal's number after a signal, as in subprocess."""
        end = time.monotonic() + _TIMEOUT
        while self.running():
            if time.monotonic() > end:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"the training did not end in {_TIMEOUT} s: {self.out}{self.err}")
            time.sleep(0.005)
        assert self._code is not None
        return self._code

    def until(self, condition: Callable[[], object], *, pause: float = 0.001) -> bool:
        """Wait until `condition` holds; False when the training ended before."""
        end = time.monotonic() + _TIMEOUT
        while not condition():
            if not self.running():
                return bool(condition())
            assert time.monotonic() < end, f"waited for {_TIMEOUT} s: {self.out}{self.err}"
            time.sleep(pause)
        return True


class TrainingServer:
    """Starts trainings in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """One request and its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, arguments: Sequence[object], environment: Mapping[str, str] | None = None) -> Training:
        """Start `python -m mtbert.train` with these arguments and further variables of the environment."""
        self._count += 1
        out, err = self.folder / f"out-{self._count}.txt", self.folder / f"err-{self._count}.txt"
        out.touch()
        err.touch()
        request = {"run": [str(a) for a in arguments], "out": str(out), "err": str(err)}
        pid = self.ask(request | {"environment": dict(environment or {})})
        return Training(self, pid, out, err)

    def run(self, arguments: Sequence[object]) -> Training:
        """Start, and wait for the end."""
        training = self.start(arguments)
        training.wait()
        return training

    def close(self) -> None:
        """End the server; trainings that still run are killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_TIMEOUT)


@contextlib.contextmanager
def training_server(folder: Path) -> Iterator[TrainingServer]:
    """A server for the time of a `with`."""
    server = TrainingServer(folder)
    try:
        yield server
    finally:
        server.close()


def _serve(folder: Path) -> None:
    import torch

    import mtbert.train
    from mtbert.cli import run_main
    from mtbert.engine.distributed import on_all_ranks

    # The first optimizer imports torch's compiler, which takes as long as all the rest: once here, not once a training.
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])

    def train(request: dict[str, Any]) -> int:
        for number, name in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_WRONLY), number)
        sys.argv = ["mtbert.train", *request["run"]]
        os.environ.update(request["environment"])
        try:
            run_main(on_all_ranks(mtbert.train.main), ranks=True)
        except SystemExit as end:
            return int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
        return 0

    os.chdir(folder)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "run" in request:
            answer = os.fork()
            if answer == 0:
                os.close(0)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = train(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            running.add(answer)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))

"""What ranks say through a store that all of them reach: that they live, that they failed and why, or are done."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mtbert.errors import RankError

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in one exchange: only a rank that hangs takes so long."""

POLL_SECONDS = 0.1
_REASON_SECONDS = 3.0
"""How long a rank whose connection broke waits for the reason, and for signs of life of the others."""
_GRACE_SECONDS = 5.0
"""How long a rank may go on after another has failed, until it is ended wherever it stands."""
_SILENCE_SECONDS = 60.0
"""Without a beat, after which rank 0 is taken to be gone."""
_FAILED, _TROUBLE, _ALIVE, _DONE, _LEFT = "failed", "trouble", "alive", "done", "left"
_BEAT = "beat"
"""Counts while rank 0 lives: the others wait for its last work without an exchange that would notice its end."""


class ConnectionLost(Exception):
    """An exchange failed: another rank is gone, or did not come."""


class Signs:
    """One rank's end of the store."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """store: shared by all ranks, empty at first, a connection that nothing else uses."""
        self._store, self._rank, self._size = store, rank, size
        self._lock = threading.Lock()
        self._gone: set[int] = set()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_the_others, daemon=True)

    @property
    def _is_main(self) -> bool:
        return self._rank == 0

    def begin(self) -> None:
        """Give signs of life, and watch for failures, until the end."""
        self._watch.start()

    def end(self) -> None:
        """Say that this rank needs the store no longer. Raises nothing."""
        self._over.set()
        self._watch.join()
        self._leave()

    def say_done(self) -> None:
        """Rank 0 is done. Raises RuntimeError when the store is gone."""
        with self._lock:
            self._store.set(_DONE, "")

    def wait_until_done(self) -> None:
        """Wait for rank 0 to say that it is done.

        Raises ConnectionLost where a rank failed or rank 0 is silent, RuntimeError when the store is gone.
        """
        beat, heard = 0, time.monotonic()
        while not self._there(_DONE):
            if self._there(_FAILED):
                raise ConnectionLost("the end of the run: another rank failed")
            with self._lock:
                latest = self._store.add(_BEAT, 0)
            if latest != beat:
                beat, heard = latest, time.monotonic()
            elif time.monotonic() > heard + _SILENCE_SECONDS:
                raise ConnectionLost(
                    f"the end of the run: rank 0 gave no sign of life for {_SILENCE_SECONDS:g} s"
                )
            time.sleep(POLL_SECONDS)

    def announce(self, message: str) -> dict[str, Any]:
        """Say that this rank failed; returns what the first that failed has said."""
        own = {"rank": self._rank, "message": message}
        try:
            with self._lock:
                first = self._store.compare_set(_FAILED, "", json.dumps(own))
            found: dict[str, Any] = json.loads(first)
        except RuntimeError:  # the store is gone, and the others notice that, too
            return own
        return found

    def reason(self, error: Exception) -> str:
        """Why another rank does not answer: what it has said, else which ranks give no sign of life."""
        try:
            with self._lock:
                self._store.set(_TROUBLE, "")
            end = time.monotonic() + _REASON_SECONDS
            while time.monotonic() < end:
                if self._there(_FAILED):
                    return self._failure()
                time.sleep(POLL_SECONDS / 2)
            gone = [rank for rank in range(self._size) if not self._there(f"{_ALIVE}/{rank}")]
            self._gone.update(gone)
            if not gone:
                return f"all ranks live, but the exchange of {error} (they wait {TIMEOUT} for each other)"
            named = " and ".join(map(str, gone))
            what = f"rank {named} is gone: killed, crashed or cut off ({error})"
            self._announce_for(gone[0], "it is gone: killed, crashed or cut off")
            return f"ended, because {what}"
        except RuntimeError:
            return f"ended, because rank 0 or its machine is gone ({error})"

    def _announce_for(self, rank: int, message: str) -> None:
        with self._lock:
            self._store.compare_set(_FAILED, "", json.dumps({"rank": rank, "message": message}))

    def _failure(self) -> str:
        with self._lock:
            first = json.loads(self._store.get(_FAILED))
        return f"ended, because rank {first['rank']} failed: {first['message']}"

    def _there(self, key: str) -> bool:
        with self._lock:
            return self._store.check([key])

    def _leave(self) -> None:
        """Say that this rank needs the store no longer; rank 0, where it holds it, waits for the others to say so."""
        with contextlib.suppress(RuntimeError):
            with self._lock:
                self._store.set(f"{_LEFT}/{self._rank}", "")
            if not self._is_main or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return
            end = time.monotonic() + _REASON_SECONDS + _GRACE_SECONDS
            others = [rank for rank in range(self._size) if rank]
            while others and time.monotonic() < end:
                others = [r for r in others if r not in self._gone and not self._there(f"{_LEFT}/{r}")]
                time.sleep(POLL_SECONDS / 2)

    def _watch_the_others(self) -> None:
        """Give signs of life when asked, and end a rank that does not notice that another has failed."""
        answered, failed_at = False, math.inf
        while not self._over.wait(POLL_SECONDS):
            try:
                if self._is_main:
                    with self._lock:
                        self._store.add(_BEAT, 1)
                if not answered and self._there(_TROUBLE):
                    with self._lock:
                        self._store.set(f"{_ALIVE}/{self._rank}", "")
                    answered = True
                if failed_at == math.inf and self._there(_FAILED):
                    failed_at = time.monotonic()
                message = self._failure() if time.monotonic() > failed_at + _GRACE_SECONDS else None
            except RuntimeError:
                return  # the store is gone with rank 0 or with torchrun: the connections break as well
            if message is not None:
                sys.stderr.write(f"error: rank {self._rank}: {message}\n")
                sys.stderr.flush()
                os._exit(RankError.exit_code)

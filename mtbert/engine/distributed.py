"""Several processes that train one model: the only module that knows torch.distributed.

`torchrun --nproc-per-node N -m mtbert.train` starts N ranks. Each computes a share of every step, and what the ranks
tell each other goes through a `World`. A process on its own has `ALONE`, whose methods give back what they are given.

Sums are the same on every rank bit for bit (each element is added up in one place and copied from there), so ranks
that begin with the same weights keep the same weights.

A rank that fails writes why into the store that all ranks share; the others end with that reason. A rank that is
killed writes nothing: its connections break, and whoever does not answer within seconds is named.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtbert.errors import ConfigError, Interrupted, RankError, UserError
from mtbert.ranges import span

Part = tuple[Tensor | None, Tensor]
"""What a rank adds to a sum, or None for nothing; and a tensor of the same shape, dtype and device."""

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others in one exchange: only a rank that hangs takes so long."""

_REASON_SECONDS = 3.0
"""How long a rank whose connection broke waits for the reason, and for signs of life of the others."""
_GRACE_SECONDS = 5.0
"""How long a rank may go on after another has failed, until it is ended wherever it stands."""
_POLL_SECONDS = 0.1
_SMALL_BYTES = 1 << 20
"""Tensors up to this size are summed together in one buffer, larger ones each in place."""
_FAILED, _TROUBLE, _ALIVE, _DONE, _LEFT = "failed", "trouble", "alive", "done", "left"
_BEAT = "beat"
"""Counts while rank 0 lives: the others wait for its last work without an exchange that would notice its end."""
_SILENCE_SECONDS = 60.0
"""Without a beat, after which rank 0 is taken to be gone."""

T = TypeVar("T")


class World:
    """All ranks of a run, from the view of one; this one is alone."""

    rank = 0
    size = 1
    local_rank = 0
    """Its number among the ranks of its machine."""
    local_size = 1
    launch: str | None = None
    """Names the call of torchrun that started this process, and starts it anew when a rank has failed; None without."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes into the run's folder."""
        return self.rank == 0

    def told(self, value: Callable[[], T]) -> T:
        """What `value` gives on rank 0, where alone it is called. It must be JSON."""
        return value()

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order. They must be JSON."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def summed(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """The sums over the ranks; None where no rank has a part. The parts are used up.

        Every rank calls it with as many parts in the same order.
        """
        return [tensor for tensor, _ in parts]

    def joined_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows [sum(counts), ...] of all ranks in their order; own: [counts[rank], ...].

        A gradient flows to the rank's own rows alone.
        """
        return own

    def share_of(self, count: int) -> range:
        """Which of `count` equal pieces of work are this rank's."""
        return range(count)

    def added(self, array: np.ndarray) -> np.ndarray:
        """The sum of the ranks' arrays of one shape, on the host."""
        return array

    def copied(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""

    def wait_for_main(self) -> None:
        """Rank 0 says that it is done; the others wait for that, however long it takes."""

    def check_same(self, digests: Mapping[str, str]) -> None:
        """Raise ConfigError, naming rank and thing, unless all ranks have the same digests."""


ALONE = World()
"""A process on its own."""


def on_all_ranks(main: Callable[[list[str], World], None]) -> Callable[[list[str]], None]:
    """An entry point that torchrun may start: `main` gets the world that the process belongs to."""

    def joined_main(arguments: list[str]) -> None:
        with Ranks.joined() as world:
            main(arguments, world)
            world.wait_for_main()

    def joined(arguments: list[str]) -> None:
        if not _was_launched():
            main(arguments, ALONE)
            return
        if not dist.is_available():
            raise ConfigError(
                "this build of PyTorch has no torch.distributed: start one process, without torchrun"
            )
        from torch.distributed.elastic.multiprocessing.errors import record  # imports much

        record(joined_main)(arguments)  # torchrun shows what it records

    return joined


def refuse_ranks(program: str) -> None:
    """Raise ConfigError when torchrun started more than one process of a program that is not made for it."""
    if _was_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise ConfigError(f"{program} runs in one process: start it without torchrun")


def _was_launched() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if len(missing) < len(names) and int(os.environ.get("WORLD_SIZE") or 1) > 1 and missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} are not set: start the ranks with"
            " torchrun"
        )
    return not missing and ("TORCHELASTIC_RUN_ID" in os.environ or int(os.environ["WORLD_SIZE"]) > 1)


class _ConnectionLost(Exception):
    """An exchange failed: another rank is gone, or did not come."""


class Ranks(World):
    """The ranks that torchrun started (or anything that sets its environment variables)."""

    def __init__(self, store: dist.Store, launch: str) -> None:
        """store: shared by all ranks, empty at first, a connection that nothing else uses."""
        environment = os.environ
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(environment.get("LOCAL_RANK", self.rank))
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", self.size))
        self.launch = launch
        self._store = store
        self._store_lock = threading.Lock()
        self._gone: set[int] = set()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_the_others, daemon=True)

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Join the ranks of the environment; errors within are told to all of them.

        Raises RankError for the failure of another rank, and the rank's own UserErrors with its number before them.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Tensors of the host go through gloo, those of a GPU through NCCL.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
            # torchrun keeps the store when it starts the ranks anew: the launch is the same, all other keys are stale.
            launch = store.compare_set("mtbert/launch", "", secrets.token_hex(8)).decode()
            name = _agree_on_a_name(store, rank, size)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(f"{name}/group", store),
                rank=rank,
                world_size=size,
                timeout=TIMEOUT,
            )
            client = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"rank {os.environ['RANK']} cannot reach the others at {address}:{port}: {_first_line(error)}"
            ) from error
        world = cls(dist.PrefixStore(name, client), launch)
        try:
            world._watch.start()
            with world._reporting():
                yield world
        finally:
            world._over.set()
            world._watch.join()
            world._leave()
            with contextlib.suppress(RuntimeError):  # of connections that are broken already
                dist.destroy_process_group()

    # ---- what the ranks tell each other ----

    def told(self, value: Callable[[], T]) -> T:
        """What `value` gives on rank 0."""
        data = json.dumps(value()).encode() if self.is_main else b""
        with self._exchange("a message of rank 0"):
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0)
            buffer = torch.empty(int(size), dtype=torch.uint8)
            if self.is_main:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(buffer, 0)
        found: T = json.loads(buffer.numpy().tobytes())
        return found

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        data = json.dumps(value).encode()
        with self._exchange("messages of all ranks"):
            sizes = torch.zeros(self.size, dtype=torch.int64)
            sizes[self.rank] = len(data)
            dist.all_reduce(sizes)
            mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            everyone = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyone, mine)
        return [
            json.loads(each[:size].numpy().tobytes())
            for each, size in zip(everyone, sizes.tolist(), strict=True)
        ]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self._anywhere([flag])[0]

    def summed(self, parts: Sequence[Part]) -> list[Tensor | None]:
        """The sums over the ranks.

        One exchange on the host finds what there is to sum, which does not wait for the device. Large tensors are
        summed in place, all others in one buffer of their dtype.
        """
        there = self._anywhere([tensor is not None for tensor, _ in parts])
        sums: list[Tensor | None] = [None] * len(parts)
        large: list[Tensor] = []
        small: dict[torch.dtype, dict[int, Tensor]] = {}
        for place, ((own, like), found) in enumerate(zip(parts, there, strict=True)):
            if not found:
                continue
            shape = (
                torch.contiguous_format
            )  # of what is written in place; a companion has no memory of its own
            whole = torch.zeros_like(like, memory_format=shape) if own is None else own.detach().contiguous()
            if whole.nbytes > _SMALL_BYTES:
                sums[place] = whole
                large.append(whole)
            else:
                small.setdefault(whole.dtype, {})[place] = whole
        buffers = [torch.cat([each.flatten() for each in chosen.values()]) for chosen in small.values()]
        with self._exchange("the gradients"):
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*large, *buffers)]:
                work.wait()
        for chosen, buffer in zip(small.values(), buffers, strict=True):
            pieces = buffer.split([each.numel() for each in chosen.values()])
            for (place, each), piece in zip(chosen.items(), pieces, strict=True):
                sums[place] = piece.view(each.shape)
        return sums

    def joined_rows(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks: a sum of buffers that are zero but for the rank's own rows, which is exact."""
        first = sum(counts[: self.rank])
        last = first + counts[self.rank]
        rows = own.new_zeros(sum(counts), *own.shape[1:])
        rows[first:last] = own.detach()
        with self._exchange("the embeddings"):
            dist.all_reduce(rows)
        return torch.cat([rows[:first], own, rows[last:]])

    def share_of(self, count: int) -> range:
        """Every size-th piece."""
        return range(self.rank, count, self.size)

    def added(self, array: np.ndarray) -> np.ndarray:
        """The sum of the ranks' arrays."""
        tensor = torch.from_numpy(array)
        with self._exchange("outputs"):
            dist.all_reduce(tensor)
        return tensor.numpy()

    def copied(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        with self._exchange("the weights of rank 0"), torch.no_grad():
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, 0)
                if whole is not tensor:
                    tensor.copy_(whole)

    def wait_for_main(self) -> None:
        """Rank 0 says that it is done; the others wait for that."""
        if self.is_main:
            with self._exchange("the end of the run"), self._store_lock:
                self._store.set(_DONE, "")
            return
        beat, heard = 0, time.monotonic()
        while True:
            with self._exchange("the end of the run"):
                if self._there(_DONE):
                    return
                failed = self._there(_FAILED)
                with self._store_lock:
                    latest = self._store.add(_BEAT, 0)
            if failed:
                raise _ConnectionLost("the end of the run: another rank failed")
            if latest != beat:
                beat, heard = latest, time.monotonic()
            elif time.monotonic() > heard + _SILENCE_SECONDS:
                raise _ConnectionLost(
                    f"the end of the run: rank 0 gave no sign of life for {_SILENCE_SECONDS:g} s"
                )
            time.sleep(_POLL_SECONDS)

    def check_same(self, digests: Mapping[str, str]) -> None:
        """Raise ConfigError unless all ranks have the same digests."""
        found = self.gathered(dict(digests))
        odd = [
            f"{what} of rank {rank} differ from those of rank 0"
            for rank, theirs in enumerate(found)
            for what, digest in found[0].items()
            if theirs.get(what) != digest
        ]
        if odd:
            raise ConfigError(f"the ranks must begin alike, but {'; '.join(odd)}")

    def _anywhere(self, flags: Sequence[bool]) -> list[bool]:
        found = torch.tensor(flags, dtype=torch.uint8)
        with self._exchange("the end of a step"):
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]

    # ---- failures ----

    @contextlib.contextmanager
    def _exchange(self, what: str) -> Iterator[None]:
        """Errors of torch.distributed within become _ConnectionLost."""
        try:
            with span("communication", what):
                yield
        except RuntimeError as error:  # DistError and its kinds are RuntimeErrors, those of gloo nothing more
            raise _ConnectionLost(f"{what}: {_first_line(error)}") from error

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Tell the other ranks of an error, or find out what happened to them."""
        try:
            yield
        except (_ConnectionLost, dist.DistError) as error:
            raise RankError(f"rank {self.rank}: {self._reason(error)}") from error
        except Interrupted:  # all ranks agreed on it
            if not self.is_main:
                raise SystemExit(Interrupted.exit_code) from None
            raise
        except UserError as error:
            message = str(error)
            first = self._announce(message)
            if first["rank"] != self.rank and first["message"] == message:
                raise SystemExit(error.exit_code) from None  # the same everywhere: said once
            error.args = (f"rank {self.rank}: {message}",)
            raise
        except SystemExit as end:
            if end.code:
                self._announce(f"it ended with exit code {end.code}")
            raise
        except BaseException as error:
            self._announce("".join(traceback.format_exception_only(error)).strip())
            raise

    def _announce(self, message: str) -> dict[str, Any]:
        """Say that this rank failed; returns what the first that failed has said."""
        own = {"rank": self.rank, "message": message}
        try:
            with self._store_lock:
                first = self._store.compare_set(_FAILED, "", json.dumps(own))
            found: dict[str, Any] = json.loads(first)
        except RuntimeError:  # the store is gone, and the others notice that, too
            return own
        return found

    def _reason(self, error: Exception) -> str:
        """Why another rank does not answer: what it has said, else which ranks give no sign of life."""
        try:
            with self._store_lock:
                self._store.set(_TROUBLE, "")
            end = time.monotonic() + _REASON_SECONDS
            while time.monotonic() < end:
                if self._there(_FAILED):
                    return self._failure()
                time.sleep(_POLL_SECONDS / 2)
            gone = [rank for rank in range(self.size) if not self._there(f"{_ALIVE}/{rank}")]
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
        with self._store_lock:
            self._store.compare_set(_FAILED, "", json.dumps({"rank": rank, "message": message}))

    def _failure(self) -> str:
        with self._store_lock:
            first = json.loads(self._store.get(_FAILED))
        return f"ended, because rank {first['rank']} failed: {first['message']}"

    def _there(self, key: str) -> bool:
        with self._store_lock:
            return self._store.check([key])

    def _leave(self) -> None:
        """Say that this rank needs the store no longer; rank 0, where it holds it, waits for the others to say so."""
        with contextlib.suppress(RuntimeError):
            with self._store_lock:
                self._store.set(f"{_LEFT}/{self.rank}", "")
            if not self.is_main or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return
            end = time.monotonic() + _REASON_SECONDS + _GRACE_SECONDS
            others = [rank for rank in range(self.size) if rank]
            while others and time.monotonic() < end:
                others = [r for r in others if r not in self._gone and not self._there(f"{_LEFT}/{r}")]
                time.sleep(_POLL_SECONDS / 2)

    def _watch_the_others(self) -> None:
        """Give signs of life when asked, and end a rank that does not notice that another has failed."""
        answered, failed_at = False, math.inf
        while not self._over.wait(_POLL_SECONDS):
            try:
                if self.is_main:
                    with self._store_lock:
                        self._store.add(_BEAT, 1)
                if not answered and self._there(_TROUBLE):
                    with self._store_lock:
                        self._store.set(f"{_ALIVE}/{self.rank}", "")
                    answered = True
                if failed_at == math.inf and self._there(_FAILED):
                    failed_at = time.monotonic()
                message = self._failure() if time.monotonic() > failed_at + _GRACE_SECONDS else None
            except RuntimeError:
                return  # the store is gone with rank 0 or with torchrun: the connections break as well
            if message is not None:
                sys.stderr.write(f"error: rank {self.rank}: {message}\n")
                sys.stderr.flush()
                os._exit(RankError.exit_code)


def _agree_on_a_name(store: dist.Store, rank: int, size: int) -> str:
    """A name that no ranks before these had in a store that may hold their keys. Raises RuntimeError.

    Every other rank says hello with a number of its own; rank 0 answers each number with the name, and hears who has
    it.
    """
    if rank:
        own = secrets.token_hex(8)
        store.set(f"mtbert/hello/{rank}", own)
        name = store.get(f"mtbert/welcome/{own}").decode()
        store.set(f"mtbert/here/{name}/{rank}", "")
        return name
    name = f"mtbert/{secrets.token_hex(8)}"
    missing, answered = set(range(1, size)), set()
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"mtbert/here/{name}/{other}"]):
                missing.discard(other)
            elif store.check([f"mtbert/hello/{other}"]):
                number = store.get(f"mtbert/hello/{other}").decode()
                if number not in answered:
                    store.set(f"mtbert/welcome/{number}", name)
                    answered.add(number)
        if time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come in {TIMEOUT}")
        time.sleep(_POLL_SECONDS / 10)
    return name


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

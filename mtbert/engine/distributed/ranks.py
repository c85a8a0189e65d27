"""The ranks that torchrun started: what they tell each other, and how the failure of one reaches the others."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mtbert.engine.distributed.signs import POLL_SECONDS, TIMEOUT, ConnectionLost, Signs
from mtbert.engine.distributed.world import Part, World
from mtbert.errors import ConfigError, Interrupted, RankError, UserError
from mtbert.ranges import span

_SMALL_BYTES = 1 << 20
"""Tensors up to this size are summed together in one buffer, larger ones each in place."""

T = TypeVar("T")


class Ranks(World):
    """The ranks that torchrun started (or anything that sets its environment variables)."""

    def __init__(self, signs: Signs, launch: str) -> None:
        environment = os.environ
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(environment.get("LOCAL_RANK", self.rank))
        self.local_size = int(environment.get("LOCAL_WORLD_SIZE", self.size))
        self.launch = launch
        self._signs = signs

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
        signs = Signs(dist.PrefixStore(name, client), rank, size)
        world = cls(signs, launch)
        try:
            signs.begin()
            with world._reporting():
                yield world
        finally:
            signs.end()
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
        with self._exchange("the end of the run"):
            if self.is_main:
                self._signs.say_done()
            else:
                self._signs.wait_until_done()

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
        """Errors of torch.distributed within become ConnectionLost."""
        try:
            with span("communication", what):
                yield
        except RuntimeError as error:  # DistError and its kinds are RuntimeErrors, those of gloo nothing more
            raise ConnectionLost(f"{what}: {_first_line(error)}") from error

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Tell the other ranks of an error, or find out what happened to them."""
        try:
            yield
        except (ConnectionLost, dist.DistError) as error:
            raise RankError(f"rank {self.rank}: {self._signs.reason(error)}") from error
        except Interrupted:  # all ranks agreed on it
            if not self.is_main:
                raise SystemExit(Interrupted.exit_code) from None
            raise
        except UserError as error:
            message = str(error)
            first = self._signs.announce(message)
            if first["rank"] != self.rank and first["message"] == message:
                raise SystemExit(error.exit_code) from None  # the same everywhere: said once
            error.args = (f"rank {self.rank}: {message}",)
            raise
        except SystemExit as end:
            if end.code:
                self._signs.announce(f"it ended with exit code {end.code}")
            raise
        except BaseException as error:
            self._signs.announce("".join(traceback.format_exception_only(error)).strip())
            raise


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
        time.sleep(POLL_SECONDS / 10)
    return name


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

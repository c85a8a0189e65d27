"""Entry points that torchrun may start, and those that it may not."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch.distributed as dist

from mtbert.engine.distributed.ranks import Ranks
from mtbert.engine.distributed.world import ALONE, World
from mtbert.errors import ConfigError


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

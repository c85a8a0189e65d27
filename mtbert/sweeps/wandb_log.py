"""Trials on Weights & Biases, where that is asked for and its library is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtbert.engine.tensorboard import Listener, scalars
from mtbert.errors import Interrupted, UserError
from mtbert.sweeps.study import Claim


def import_wandb() -> Any:
    """The library. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the library of Weights & Biases: pip install wandb") from None
    return wandb


@contextlib.contextmanager
def wandb_run(
    project: str, sweep: Path, folder: Path, settings: Mapping[str, Any], claim: Claim
) -> Iterator[Listener]:
    """A listener that sends a trial's records to a run of its own, which ends with the `with` block.

    A trial that is gone on with goes on there, too: its id is kept with the trial.
    """
    wandb = import_wandb()
    identity = str(claim.facts.get("wandb") or wandb.util.generate_id())
    claim.note(wandb=identity)
    run = wandb.init(
        project=project,
        group=sweep.resolve().name,
        name=folder.name,
        id=identity,
        resume="allow",
        config=dict(settings),
        tags=[str(tag)[:64] for tag in claim.facts.get("tags", [])],
        dir=str(folder),
        reinit=True,
    )

    def listen(record: dict[str, Any]) -> None:
        run.log(dict(scalars(record)), step=record["step"])

    code = 0
    try:
        yield listen
    except BaseException as error:
        name = type(error).__name__
        run.summary["ended"] = name.lower()
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        code = Interrupted.exit_code if stopped else 0 if name == "Pruned" else 1
        raise
    finally:
        run.finish(exit_code=code)

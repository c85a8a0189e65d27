"""Several processes that train one model: the only package that knows torch.distributed.

`torchrun --nproc-per-node N -m mtbert.train` starts N ranks. Each computes a share of every step, and what the ranks
tell each other goes through a `World`. A process on its own has `ALONE`, whose methods give back what they are given.

Sums are the same on every rank bit for bit (each element is added up in one place and copied from there), so ranks
that begin with the same weights keep the same weights.

A rank that fails writes why into the store that all ranks share; the others end with that reason. A rank that is
killed writes nothing: its connections break, and whoever does not answer within seconds is named.
"""

from __future__ import annotations

from mtbert.engine.distributed.launch import on_all_ranks, refuse_ranks
from mtbert.engine.distributed.ranks import Ranks
from mtbert.engine.distributed.world import ALONE, Part, World

__all__ = ["ALONE", "Part", "Ranks", "World", "on_all_ranks", "refuse_ranks"]

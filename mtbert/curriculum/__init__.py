"""Which examples come next: the tasks' batches of every step, with a state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping

from mtbert.curriculum.base import Curriculum, Plan
from mtbert.curriculum.config import CurriculumConfig
from mtbert.curriculum.drawn import Annealed, Proportional, SquareRoot
from mtbert.curriculum.dynamic import Dynamic
from mtbert.curriculum.turns import Parallel, RoundRobin, Sequential
from mtbert.data.batching import TaskBatches

__all__ = [
    "Annealed",
    "Curriculum",
    "CurriculumConfig",
    "Dynamic",
    "Parallel",
    "Plan",
    "Proportional",
    "RoundRobin",
    "Sequential",
    "SquareRoot",
    "build_curriculum",
]

_KINDS: dict[str, type[Curriculum]] = {
    "parallel": Parallel,
    "round-robin": RoundRobin,
    "sequential": Sequential,
    "proportional": Proportional,
    "sqrt": SquareRoot,
    "annealed": Annealed,
    "dynamic": Dynamic,
}


def build_curriculum(
    batches: Mapping[str, TaskBatches],
    config: CurriculumConfig,
    *,
    sizes: Mapping[str, int],
    seed: int,
    epochs: float,
) -> Curriculum:
    """The curriculum of `config.mixing`. Raises ConfigError where order or start do not fit the run."""
    return _KINDS[config.mixing](batches, config, sizes=sizes, seed=seed, epochs=epochs)

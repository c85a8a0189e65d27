"""Everything that can be set for one task."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mtbert.data.batching import Sampling
from mtbert.errors import ConfigError
from mtbert.losses.task_losses import LossConfig
from mtbert.model.heads import HeadConfig


@dataclass
class TaskConfig:
    """One task's batches, text limit, loss and head."""

    batch_size: int = 16
    """Examples of this task in a step."""
    max_length: int = 512
    """Tokens of a sentence (of a pair, for a cross-encoder) with [CLS] and [SEP]; longer text is truncated."""
    truncate: Literal["head", "tail", "both"] = "head"
    """Which end of a longer text is kept; `both` keeps half of the limit from each (Sun et al. 2019)."""
    sampling: Sampling = "shuffled"
    """shuffled: every example once a cycle; class-balanced: every class equally often in every batch, the examples of
    rare classes more often."""
    train_fraction: float = 1.0
    """Share of the training examples to use, above 0 and at most 1: the same ones for a seed, classes in proportion."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The head."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {self.batch_size}")
        if not 8 <= self.max_length <= 4096:
            raise ConfigError(f"max_length: expected 8 to 4096 tokens, found {self.max_length}")
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(
                f"train_fraction: expected a number above 0 and at most 1, found {self.train_fraction}"
            )

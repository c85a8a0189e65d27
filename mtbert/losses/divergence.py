"""How far two outputs of one task are apart: what SMART and Bregman proximal point optimisation regularise.

The two outputs are nearly equal most of the time, so every formula here is made of their differences and loses nothing
to cancellation. (In float32, at a value of 3e-10, the sum of two `F.kl_div` was found 50 times too large.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.losses.objective import check_tasks
from mtbert.model.multitask import MultiTaskModel
from mtbert.tasks.registry import Kind, Task

DivergenceName = Literal["kl", "squared", "mse"]


@dataclass(frozen=True)
class OutputDivergence:
    """l_s of Jiang et al. 2020 (SMART), section 2, for the outputs of one task.

    - kl: D(P || Q) + D(Q || P) of the class distributions; with one logit, of the Bernoulli distributions. It equals
      sum (p - q) (log p - log q), where for one logit z the sum is (p - q) (z_p - z_q).
    - squared: sum of (p - q)^2 over the class probabilities (with one logit: of class 1), or of the score.
    - mse: the mean of the squared differences of the logits, or that of the score.

    Scores are scaled to 0..1, as in the task's loss; for them squared and mse are the same.
    """

    name: DivergenceName
    kind: Kind
    score_range: tuple[float, float] | None = None
    detached: bool = False
    """Of kl: each part sends its gradient through its second distribution alone, as public code has it. The value
    stays; near each other the gradient is half the full one."""

    def __call__(self, outputs: Tensor, others: Tensor) -> Tensor:
        """Divergence `[n]` of each example, at least 0; outputs, others: `[n, outputs]` as heads give them."""
        if self.score_range is not None:
            low, high = self.score_range
            return ((outputs - others) / (high - low)).square().mean(-1)
        if self.name == "mse":
            return (outputs - others).square().mean(-1)
        p, log_p = self._distribution(outputs)
        q, log_q = self._distribution(others)
        if self.name == "squared":
            return (p - q).square().sum(-1)
        difference = p - q
        return ((difference.detach() if self.detached else difference) * (log_p - log_q)).sum(-1)

    def _distribution(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, and logarithms whose differences weigh them."""
        if self.kind == "binary":
            return outputs.sigmoid(), outputs
        logarithms = outputs.log_softmax(-1)
        return logarithms.exp(), logarithms


def build_divergences(
    field: str,
    names: Sequence[str],
    tasks: Mapping[str, Task],
    chosen: Mapping[str, str] | None = None,
    *,
    detached: bool = False,
) -> dict[str, OutputDivergence]:
    """The divergence of each of the tasks `names`: the chosen one, else kl for classes and squared for scores.

    Raises ConfigError, naming `field`, for tasks that the run does not have and divergences that a task cannot have.
    """
    check_tasks(f"{field}.tasks", names, list(tasks))
    chosen = chosen or {}
    check_tasks(f"{field}.divergence", list(chosen), list(names))
    found = {}
    for name in names:
        task = tasks[name]
        default = "squared" if task.kind == "similarity" else "kl"
        divergence: DivergenceName = chosen.get(name, default)  # type: ignore[assignment]
        if divergence == "kl" and task.kind == "similarity":
            raise ConfigError(
                f"{field}.divergence: kl is not possible for {name}, a similarity has no class distribution; "
                "possible: squared, mse"
            )
        found[name] = OutputDivergence(divergence, task.kind, task.score_range, detached)
    return found


def check_divergence_names(field: str, chosen: Mapping[str, str]) -> None:
    """Raise ConfigError unless every chosen divergence exists."""
    for task, name in chosen.items():
        if name not in get_args(DivergenceName):
            possible = ", ".join(get_args(DivergenceName))
            raise ConfigError(f"{field}: unknown divergence {name!r} of task {task}; possible: {possible}")


def has_encoder_dropout(model: MultiTaskModel) -> bool:
    """Whether the encoder itself drops anything: two passes with other masks then differ by far more than rounding.

    The dropout of adapters and heads does not count. What an adapter adds is 0 as training begins, whatever its mask;
    and a head can read rows that differ by the rounding of the encoder alone.
    """
    rates = model.encoder.dropouts
    return max(rates.embedding, rates.attention, rates.hidden) > 0


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)

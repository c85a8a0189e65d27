"""Gradient surgery: how the gradients of K tasks over the parameters that they share become one.

Every method here is a function of the Gram matrix G = [<g_i, g_j>] alone and returns coefficients c; the combined
gradient is sum_k c_k g_k. All of it is tensor arithmetic of a fixed shape, so that nothing waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtbert.errors import ConfigError
from mtbert.optim.cone import cagrad_weights, nash_weights, upgrad_weights

Method = Literal["sum", "pcgrad", "gradvac", "cagrad", "nash", "upgrad", "uncertainty"]


@dataclass
class SurgeryConfig:
    """How the tasks' gradients are combined."""

    method: Method = "sum"
    """sum of the weighted tasks; pcgrad (Yu et al. 2020); gradvac (Wang et al. 2021); cagrad (Liu et al. 2021); nash
    (Navon et al. 2022); upgrad (Quinton and Rey 2024); uncertainty: learned task weights (Kendall et al. 2018)."""
    variant: Literal["paper", "reference"] = "paper"
    """pcgrad as published, or as the common public code has it (reference): the heads take part, and the shared
    gradient is the mean of the projected gradients instead of their sum."""
    gradients: Literal["one-pass", "per-task"] = "one-pass"
    """All tasks' gradients from one backward pass, or from one backward pass a task (slow; the same gradients)."""
    measure: bool = False
    """Log the cosines between the tasks' gradients even where the method does not need them."""
    gradvac_decay: float = 0.01
    """beta of gradvac: the weight of a step's cosine in its running target."""
    cagrad_c: float = 0.4
    """c of cagrad: how far, relative to its norm, the result may lie from the mean gradient; below 1."""

    def __post_init__(self) -> None:
        if not 0 < self.gradvac_decay <= 1:
            raise ConfigError(
                f"surgery.gradvac_decay: expected above 0 and at most 1, found {self.gradvac_decay}"
            )
        if not 0 <= self.cagrad_c < 1:
            raise ConfigError(f"surgery.cagrad_c: expected at least 0 and below 1, found {self.cagrad_c}")
        if self.gradients == "per-task" and not self.needs_task_gradients:
            raise ConfigError(
                f"surgery.gradients: per-task has no effect with method {self.method}; possible: one-pass"
            )
        if self.variant == "reference" and self.method != "pcgrad":
            raise ConfigError(f"surgery.variant: reference is a variant of pcgrad, not of {self.method}")

    @property
    def needs_task_gradients(self) -> bool:
        """Whether the gradients of the tasks are needed one by one."""
        return self.measure or self.method not in ("sum", "uncertainty")


@dataclass(frozen=True)
class Combined:
    """What a method makes of a Gram matrix."""

    shared: Tensor
    """[K] coefficients of the tasks' gradients over the shared parameters."""
    own: Tensor
    """[K] coefficients of each task's gradient over the parameters that are its own."""
    altered: Tensor
    """[K, K] bool: whether task i's gradient was altered along that of task j."""


class Surgery:
    """Coefficients for every step; `state` is what a checkpoint keeps."""

    def __init__(self, config: SurgeryConfig, tasks: tuple[str, ...], seed: int) -> None:
        self.config = config
        self.tasks = tasks
        self.seed = seed
        self.targets: dict[tuple[str, str], Tensor] = {}

    def orders(self, tasks: int, step: int) -> Tensor:
        """The random orders of a step with that many tasks, on the host (see `random_orders`)."""
        return torch.from_numpy(random_orders(tasks, self.seed, step))

    def combine(self, gram: Tensor, tasks: tuple[str, ...], orders: Tensor) -> Combined:
        """gram: [K, K] of `tasks`, in at least float32; orders: those of the step, on the device of gram."""
        ones = torch.ones_like(gram[0])
        none = torch.zeros_like(gram, dtype=torch.bool)
        method = self.config.method
        if method in ("sum", "uncertainty"):
            return Combined(ones, ones, none)
        if method == "pcgrad":
            mixed = pcgrad(gram, orders)
            if self.config.variant == "reference":
                return Combined(mixed.sum(0) / len(tasks), mixed.sum(0), _off_diagonal(mixed))
            return Combined(mixed.sum(0), ones, _off_diagonal(mixed))
        if method == "gradvac":
            mixed = self._gradvac(gram, tasks, orders)
            return Combined(mixed.sum(0), ones, _off_diagonal(mixed))
        weights = {
            "cagrad": lambda: cagrad_weights(gram, self.config.cagrad_c),
            "nash": lambda: nash_weights(gram),
            "upgrad": lambda: upgrad_weights(gram),
        }[method]()
        return Combined(weights, ones, none)

    def _gradvac(self, gram: Tensor, tasks: tuple[str, ...], orders: Tensor) -> Tensor:
        """Changes the targets where they lie: a captured step finds them there again."""
        for pair in itertools.product(tasks, tasks):
            target = self.targets.get(pair)
            self.targets[pair] = gram.new_zeros(()) if target is None else target.to(gram)
        held = [self.targets[pair] for pair in itertools.product(tasks, tasks)]
        targets = torch.stack(held).view(len(tasks), len(tasks))
        mixed, moved = gradvac(gram, targets, orders, self.config.gradvac_decay)
        # A step whose gradients overflow is skipped, and must not stay in the running cosines for ever.
        targets = torch.where(gram.isfinite().all(), moved, targets)
        torch._foreach_copy_(held, list(targets.flatten().unbind()))
        return mixed

    def state(self) -> dict[str, Tensor]:
        """GradVac's running cosines, by `i/j`."""
        return {f"{i}/{j}": target for (i, j), target in self.targets.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of `state()`."""
        self.targets = {(name.split("/")[0], name.split("/")[1]): v.clone() for name, v in state.items()}


def _off_diagonal(mixed: Tensor) -> Tensor:
    return (mixed != 0) & ~torch.eye(len(mixed), dtype=torch.bool, device=mixed.device)


def random_orders(tasks: int, seed: int, step: int) -> np.ndarray:
    """For each task the others in random order, int64 [K, K - 1]: a pure function of the seed and the step."""
    generator = np.random.Philox(key=seed & (2**64 - 1), counter=[step, 0, 0, 0x5367])
    orders = np.empty((tasks, tasks - 1), dtype=np.int64)
    for i in range(tasks):
        others = np.delete(np.arange(tasks), i)
        orders[i] = others[np.argsort(generator.random_raw(tasks - 1), kind="stable")]
    return orders


def pcgrad(gram: Tensor, orders: Tensor) -> Tensor:
    """PCGrad (Yu et al. 2020, algorithm 1): [K, K], row i is task i's projected gradient in terms of the tasks' own.

    For every other task j in the order `orders[i]` [K, K - 1]: where g_i and the original g_j conflict (their inner
    product is negative), g_i loses its component along g_j. The published update is the sum over i.
    """
    mixed = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    rows = torch.arange(len(gram), device=gram.device)
    norms = gram.diagonal()
    for place in range(orders.shape[1]):
        j = orders[:, place]
        inner = (mixed @ gram)[rows, j]
        mixed[rows, j] -= torch.where((inner < 0) & (norms[j] > 0), inner / norms[j], 0.0)
    return mixed


def gradvac(gram: Tensor, targets: Tensor, orders: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Gradient Vaccine (Wang et al. 2021, algorithm 1): the altered gradients as in `pcgrad`, and the new targets.

    Where the cosine phi of g_i (as altered so far) and the original g_j is below its running target t, g_i gains
    ||g_i|| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (||g_j|| sqrt(1 - t^2)) g_j, which makes the cosine t. Then
    t <- (1 - decay) t + decay phi. targets: [K, K], zero at first (so that the first steps are PCGrad's).

    Gradients, cosines and targets are those of all shared parameters as one vector. The paper also takes parts of the
    model (its encoder, its layers, its matrices) one by one, each with targets of its own.
    """
    mixed = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    rows = torch.arange(len(gram), device=gram.device)
    norms = gram.diagonal().clamp(min=0).sqrt()
    targets = targets.clone()
    for place in range(orders.shape[1]):
        j = orders[:, place]
        product = mixed @ gram
        own = (product * mixed).sum(1).clamp(min=0).sqrt()
        scale = own * norms[j]
        cosine = torch.where(scale > 0, product[rows, j] / scale, 0.0).clamp(-1, 1)
        target = targets[rows, j]
        sine = (1 - target**2).clamp(min=torch.finfo(gram.dtype).eps).sqrt()
        gain = own * (target * (1 - cosine**2).sqrt() - cosine * sine) / (norms[j] * sine)
        mixed[rows, j] += torch.where((cosine < target) & (scale > 0), gain, 0.0)
        targets[rows, j] = (1 - decay) * target + decay * cosine
    return mixed, targets


def cosines(gram: Tensor) -> Tensor:
    """[K, K] cosines between the gradients; 0 where one of them is zero."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    return torch.where(scale > 0, gram / scale, 0.0)


class UncertaintyWeights(torch.nn.Module):
    """Task weights learned from homoscedastic uncertainty (Kendall, Gal and Cipolla 2018, equations 7 and 10).

    A classification's loss L becomes exp(-s) L + s / 2, a similarity's exp(-s) L / 2 + s / 2, with a learned log
    variance s for each task, 0 at first.
    """

    def __init__(self, similarity: Mapping[str, bool]) -> None:
        """similarity: whether each task is a regression."""
        super().__init__()
        self.tasks = tuple(similarity)
        self.halves = {task: 0.5 if regression else 1.0 for task, regression in similarity.items()}
        self.log_variance = torch.nn.Parameter(torch.zeros(len(self.tasks)))

    def forward(self, task: str, loss: Tensor, share: float | Tensor) -> Tensor:
        """The weighted loss of one pass: `share` of s / 2 counts, so that the passes of a step add up to it."""
        s = self.log_variance[self.tasks.index(task)]
        return self.halves[task] * torch.exp(-s) * loss + share * 0.5 * s

    @torch.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """The current factor of each task's loss, 0-d, on the device: later updates do not change it."""
        factors = torch.exp(-self.log_variance).unbind()
        return {task: self.halves[task] * f for task, f in zip(self.tasks, factors, strict=True)}

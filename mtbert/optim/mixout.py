"""Mixout: in every step, a random part of the encoder's weights is replaced by the pretrained ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtbert import kernels
from mtbert.errors import ConfigError
from mtbert.model.dropout import check_probability, mixout_site
from mtbert.model.multitask import MultiTaskModel
from mtbert.ranges import span

_LINEAR = re.compile(
    r"layers\.\d+\.(query_key_value|attention_output|intermediate|output)\.weight|pooler\.weight"
)


@dataclass
class MixoutConfig:
    """Mixout (Lee, Cho and Kang 2020)."""

    p: float = 0.0
    """Probability with which each weight is replaced by its pretrained value in a step; 0 switches mixout off."""

    def __post_init__(self) -> None:
        check_probability("mixout.p", self.p)


class Mixout:
    """Replaces the matrices of the encoder's linear layers, as the authors' code does, for the duration of a step.

    With pretrained weights u, a step computes with

        w' = ((1 - m) w + m u - p u) / (1 - p),    m ~ Bernoulli(p) for each element,

    so that the mean of w' is w, and so dL/dw = dL/dw' (1 - m) / (1 - p). Written with s = (1 - m) / (1 - p), which is
    a dropout mask, w' = u + s (w - u) and dL/dw = s dL/dw'. The mask is the stateless one of `mtbert.kernels`: a
    function of the run's seed, the step, the matrix, the row and the column, drawn again for the gradient instead of
    being kept. All passes of a step see the same w'.
    """

    def __init__(self, encoder: Iterable[tuple[str, nn.Parameter]], p: float, seed: int) -> None:
        """encoder: its trained parameters by name, some of them matrices, holding the pretrained values now."""
        parameters = [parameter for name, parameter in encoder if _LINEAR.fullmatch(name)]
        self._mask = kernels.Dropout(p=p, seed=seed, step=0, site=0)
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}
        self._pretrained = [parameter.detach().clone() for parameter in parameters]
        longest = max(parameter.shape[0] for parameter in parameters)
        self._rows = torch.arange(longest, dtype=torch.int32, device=parameters[0].device)
        self._step: int | Tensor = 0

    @contextmanager
    def mixed(self, step: int | Tensor) -> Iterator[None]:
        """Within it, the parameters hold w'; afterwards they hold w again, bit for bit, whatever happened."""
        self._step = step
        kept: list[tuple[nn.Parameter, Tensor]] = []
        try:
            if self._mask.threshold:
                with span("regularisation"):
                    for parameter, number in self._numbers.items():
                        weight, pretrained = parameter.data, self._pretrained[number]
                        mixed = self._masked(number, weight - pretrained).add_(pretrained)
                        kept.append((parameter, weight))
                        parameter.data = mixed
            yield
        finally:
            for parameter, weight in kept:
                parameter.data = weight

    def scale(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        """The gradient with respect to w from that with respect to w' of the last `mixed` step.

        gradient: [*shape], or [K, *shape] for those of K tasks. Gradients of parameters that are not mixed come back as
        they are.
        """
        number = self._numbers.get(parameter)
        if number is None or not self._mask.threshold:
            return gradient
        flat = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        return self._masked(number, flat).view_as(gradient)

    @torch.no_grad()
    def _masked(self, number: int, x: Tensor) -> Tensor:
        """s * x for x [groups * rows, columns] that repeats the rows of matrix `number`."""
        rows = self._rows[: self._pretrained[number].shape[0]]
        mask = kernels.Dropout(self._mask.p, self._mask.seed, self._step, mixout_site(number))
        return kernels.dropout(x, rows.repeat(x.shape[0] // len(rows)), mask)


def build_mixout(config: MixoutConfig, model: MultiTaskModel, seed: int) -> Mixout | None:
    """Mixout of a model that holds the pretrained weights now, or None when it is off.

    Raises ConfigError where the model's mode trains no matrix that could be replaced.
    """
    if not config.p:
        return None
    trained = [(name, p) for name, p in model.encoder.named_parameters() if p.requires_grad]
    if not any(_LINEAR.fullmatch(name) for name, _ in trained):
        raise ConfigError(
            f"mixout.p: found {config.p}, but mode {model.mode} trains no pretrained matrix; possible: 0, or mode full"
        )
    return Mixout(trained, config.p, seed)

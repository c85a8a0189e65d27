"""AdamW with the groups that BERT is fine-tuned with: no decay on biases and LayerNorm, the heads apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mtbert.errors import ConfigError


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) and clipping of the gradient."""

    lr: float = 1e-4
    """Peak learning rate of the encoder (or of its adapters)."""
    head_lr: float | None = None
    """Peak learning rate of the heads; by default the same as `lr`."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and LayerNorm have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest 2-norm of the whole gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e3:
                raise ConfigError(f"optim.{name}: expected a number above 0 and below 1000, found {value}")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"optim.{name}: expected at least 0, found {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optim.{name}: expected at least 0 and below 1, found {getattr(self, name)}"
                )
        if not self.eps > 0:
            raise ConfigError(f"optim.eps: expected a number above 0, found {self.eps}")


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: matrices only, so neither biases nor LayerNorm."""
    return parameter.dim() >= 2


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Groups by learning rate (encoder, heads) and decay; each carries `peak_lr` for the schedule.

    Names starting with `heads.` are the heads'. Only parameters that require a gradient are kept, in the
    order given, so that the groups of two runs of one configuration agree.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups.setdefault((name.startswith("heads."), has_decay(name, parameter)), []).append(parameter)
    head_lr = config.lr if config.head_lr is None else config.head_lr
    return [
        {
            "params": parameters,
            "peak_lr": head_lr if is_head else config.lr,
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (is_head, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over the trainable parameters of `model`."""
    groups = parameter_groups(model.named_parameters(), config)
    if not groups:
        raise ConfigError("mode: nothing to train (every parameter is frozen)")
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )

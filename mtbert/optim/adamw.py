"""AdamW with the groups that BERT is fine-tuned with: no decay on biases and LayerNorm, the heads apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from mtbert.errors import ConfigError
from mtbert.model.layer_groups import layer_of


@dataclass
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, 2019) and clipping of the gradient."""

    lr: float = 1e-4
    """Peak learning rate of the encoder (or of its adapters)."""
    head_lr: float | None = None
    """Peak learning rate of the heads; by default the same as `lr`."""
    layer_decay: float = 1.0
    """The learning rate falls by this factor from each encoder layer to the one below it; 1 gives all the same."""
    lora_plus_ratio: float = 1.0
    """Learning rate of the adapters' B matrices over that of their A matrices (LoRA+, Hayou et al. 2024)."""
    uncertainty_lr: float = 1e-2
    """Peak learning rate of the log variances of uncertainty weighting."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and LayerNorm have none."""
    pretrained_decay: float = 0.0
    """L2 decay of the encoder towards its pretrained weights, added to the gradient; 0 switches it off."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest 2-norm of the whole gradient; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "uncertainty_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e3:
                raise ConfigError(f"optim.{name}: expected a number above 0 and below 1000, found {value}")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"optim.layer_decay: expected above 0 and at most 1, found {self.layer_decay}")
        if not 0 < self.lora_plus_ratio < float("inf"):
            raise ConfigError(
                f"optim.lora_plus_ratio: expected a number above 0, found {self.lora_plus_ratio}"
            )
        for name in ("weight_decay", "pretrained_decay", "clip_norm"):
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


def peak_rates(names: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """The peak learning rate of every parameter, by name; `names` are those of the whole model.

    Heads have `head_lr`. Of L encoder layers, layer l = 1, ..., L has lr * layer_decay ** (L - l) and the embeddings,
    as layer 0, have lr * layer_decay ** L; the pooler has lr (equation 1 of Peng, Yuan and Wang 2024 after Sun et al.
    2019, and Howard and Ruder 2018). The B matrices of adapters have lora_plus_ratio times the rate of
    their A (LoRA+, Hayou et al. 2024).
    """
    names = list(names)
    depths = {name: layer_of(name) for name in names}
    top = max((depth for depth in depths.values() if depth is not None), default=0)
    rates = {}
    for name in names:
        if name.startswith("heads."):
            rates[name] = config.lr if config.head_lr is None else config.head_lr
            continue
        if name.startswith("uncertainty."):
            rates[name] = config.uncertainty_lr
            continue
        depth = depths[name]
        rates[name] = config.lr if depth is None else config.lr * config.layer_decay ** (top - depth)
        if _is_lora_b(name):
            rates[name] *= config.lora_plus_ratio
    return rates


def _is_lora_b(name: str) -> bool:
    return ".lora_b" in name


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[dict[str, object]]:
    """Groups by learning rate and decay; each carries `peak_lr` for the schedule.

    Names starting with `heads.` are the heads'. Only parameters that require a gradient are kept, in the
    order given, so that the groups of two runs of one configuration agree.
    """
    named = list(named_parameters)
    rates = peak_rates([name for name, _ in named], config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decay = config.weight_decay if has_decay(name, parameter) else 0.0
            groups.setdefault((rates[name], decay), []).append(parameter)
    return [
        {"params": parameters, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's fused AdamW over the trainable parameters of `model`."""
    groups = parameter_groups(model.named_parameters(), config)
    if not groups:
        raise ConfigError("mode: nothing to train (every parameter is frozen)")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if config.layer_decay != 1 and all(layer_of(name) is None for name in trained):
        raise ConfigError(
            f"optim.layer_decay: no encoder layer is trained in this mode, found {config.layer_decay}; possible: 1"
        )
    if config.lora_plus_ratio != 1 and not any(_is_lora_b(name) for name in trained):
        raise ConfigError(
            f"optim.lora_plus_ratio: no adapter is trained in this mode, found {config.lora_plus_ratio}; possible: 1"
        )
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )

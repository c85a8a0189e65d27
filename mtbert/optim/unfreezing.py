"""Which parameters train when: heads first, then the encoder at once or layer by layer from the top."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mtbert.errors import ConfigError
from mtbert.model.layer_groups import layer_of
from mtbert.model.multitask import MultiTaskModel


@dataclass
class UnfreezingConfig:
    """When the encoder begins to train."""

    gradual: bool = False
    """Unfreeze one more encoder layer at a time, the top layer first, the embeddings last (Howard and Ruder 2018)."""
    epochs_per_layer: float = 1.0
    """With `gradual`: epochs from one layer to the next."""
    heads_first: float = 0.0
    """Epochs in which only the heads train, before anything else does."""

    def __post_init__(self) -> None:
        if not 0 < self.epochs_per_layer < float("inf"):
            raise ConfigError(
                f"unfreezing.epochs_per_layer: expected a number above 0, found {self.epochs_per_layer}"
            )
        if not 0 <= self.heads_first < float("inf"):
            raise ConfigError(f"unfreezing.heads_first: expected at least 0, found {self.heads_first}")

    @property
    def active(self) -> bool:
        """Whether anything is frozen at any time."""
        return self.gradual or self.heads_first > 0


class Unfreezing:
    """Freezes and unfreezes what the model's mode trains, as a pure function of the epoch: there is no state to keep.

    With h = heads_first and, where `gradual` is on, e = epochs_per_layer (else 0), layer l of L trains from epoch
    h + (L - l) e on, the embeddings are layer 0, and the encoder's other parameters train from epoch h on. An
    optimizer must have been built before the first `apply`, over all that will ever train.
    """

    def __init__(self, model: MultiTaskModel, config: UnfreezingConfig, epochs: float) -> None:
        """`epochs` is the length of the training. Raises ConfigError where a part would never be unfrozen."""
        if config.heads_first >= epochs:
            raise ConfigError(
                f"unfreezing.heads_first: after {config.heads_first:g} epochs the encoder would begin to train, but"
                f" training has {epochs:g}; possible: below that"
            )
        if config.gradual and model.mode != "full":
            raise ConfigError(f"unfreezing.gradual: possible in mode full only, the mode is {model.mode}")
        if config.heads_first and model.mode == "last-linear-layer":
            raise ConfigError(
                "unfreezing.heads_first: mode last-linear-layer trains nothing but the heads; possible: 0"
            )
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if config.heads_first and all(name.startswith("encoder.") for name, _ in trained):
            raise ConfigError("unfreezing.heads_first: the heads have no parameters to train; possible: 0")
        top = len(model.encoder.layers)
        trained_layers = {layer for name, _ in trained if (layer := layer_of(name)) is not None}
        lowest = min(trained_layers, default=top)
        below = top - lowest
        last = config.heads_first + below * config.epochs_per_layer
        if config.gradual and last >= epochs:
            part = f"layer {lowest}" if lowest else "the embeddings"
            raise ConfigError(
                f"unfreezing.epochs_per_layer: with {config.epochs_per_layer:g} {part}, below {below} layers,"
                f" would begin to train after {last:g} epochs, but training has {epochs:g}; possible: below"
                f" {(epochs - config.heads_first) / below:.4g}, or epochs above {last:g}"
            )
        self._start: list[tuple[nn.Parameter, float]] = []
        for name, parameter in trained:
            if not name.startswith("encoder."):
                continue
            layer = layer_of(name)
            below = top - layer if config.gradual and layer is not None else 0
            self._start.append((parameter, config.heads_first + below * config.epochs_per_layer))

    def apply(self, epoch: float) -> bool:
        """Set what trains after `epoch` epochs; returns whether that changed anything."""
        changed = False
        for parameter, start in self._start:
            trains = epoch >= start - 1e-9  # epochs are steps divided by steps an epoch
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
                parameter.grad = None
                changed = True
        return changed

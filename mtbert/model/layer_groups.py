"""Names for groups of the encoder's layers, and the layer that a parameter belongs to."""

from __future__ import annotations

import re
from typing import Literal

from mtbert.errors import ConfigError

LayerGroup = Literal["all", "first4", "mid4", "last4"]
"""mid4 is the four in the middle: layers 1 to 4 of six, 4 to 7 of twelve."""


def layer_numbers(field: str, layers: str | list[int], count: int) -> list[int]:
    """The numbers from 0, ascending, of the layers that `layers` names in an encoder of `count` layers.

    field: whose value it is, for the ConfigError.
    """
    if isinstance(layers, str):
        starts = {"first4": 0, "mid4": (count - 4) // 2, "last4": count - 4}
        if layers == "all":
            return list(range(count))
        if layers not in starts:
            possible = f"all, {', '.join(starts)} or a list of numbers from 0 to {count - 1}"
            raise ConfigError(f"{field}: unknown group {layers!r}; possible: {possible}")
        if count < 4:
            raise ConfigError(f"{field}: {layers} needs four layers, the encoder has {count}")
        return list(range(starts[layers], starts[layers] + 4))
    for number in layers:
        if not 0 <= number < count:
            raise ConfigError(f"{field}: no layer {number}; the encoder has layers 0 to {count - 1}")
    if not layers or len(set(layers)) != len(layers):
        raise ConfigError(f"{field}: expected different layers, at least one, found {layers}")
    return sorted(layers)


def layer_of(name: str) -> int | None:
    """The encoder layer of a parameter of the model, by its name: 1 to L, 0 for the embeddings, None for what is in no
    layer."""
    if name.startswith("encoder.embeddings."):
        return 0
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(match[1]) + 1 if match else None

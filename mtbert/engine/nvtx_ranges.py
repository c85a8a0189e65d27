"""A run's ranges for NVIDIA Nsight Systems, through the package `nvtx`; they cost about a microsecond each."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from mtbert.engine.range_tree import Label, RangeTree
from mtbert.errors import ConfigError

DOMAIN = "mtbert"
"""What nsys calls them together."""

_COLOURS = {
    "forward": "blue",
    "recompute": "purple",
    "backward": "orange",
    "loss": "yellow",
    "surgery": "red",
    "optimizer": "green",
}
"""By the first word of a name; others are grey."""


def check_nvtx() -> None:
    """Raise ConfigError unless the package is there."""
    if importlib.util.find_spec("nvtx") is None:
        raise ConfigError(
            "profile: nvtx needs the package nvtx, which is not installed (pip install nvtx, or mtbert with its extra"
            " [profile]); possible: torch, none"
        )


class NvtxRanges(RangeTree):
    """Pushes and pops in the domain `mtbert`."""

    def __init__(self) -> None:
        super().__init__()
        import nvtx

        self._domain = nvtx.get_domain(DOMAIN)
        self._attributes = functools.lru_cache(maxsize=4096)(
            self._make_attributes
        )  # step numbers pass through

    def _open(self, label: Label) -> None:
        self._domain.push_range(self._attributes(label.name))

    def _close(self) -> None:
        self._domain.pop_range()

    def _make_attributes(self, name: str) -> Any:
        colour = _COLOURS.get(name.split()[0], "grey")
        return self._domain.get_event_attributes(message=name, color=colour)

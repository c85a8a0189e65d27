"""What a profile is: ranges for Nsight Systems, or torch's profiler over some steps. It changes no computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from mtbert.engine.flops import EncoderSizes
from mtbert.engine.nvtx_ranges import NvtxRanges, check_nvtx
from mtbert.engine.torch_profile import TorchProfile
from mtbert.errors import ConfigError
from mtbert.model.bert import BertConfig
from mtbert.ranges import listening

if TYPE_CHECKING:
    from mtbert.config import TrainConfig
    from mtbert.engine.build import Machine

Profile = Literal["none", "nvtx", "torch"]


@dataclass
class ProfilingConfig:
    """Which steps torch's profiler records."""

    skip_steps: int = 5
    """Steps before the first recorded one, after a start and after a resumption: the first steps of a process are slow,
    and so is a profiler's own start."""
    active_steps: int = 5
    """Recorded steps; fewer where an evaluation, a checkpoint or the end of the training comes before."""

    def __post_init__(self) -> None:
        for name in ("skip_steps", "active_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"profiling.{name}: expected at least 1, found {getattr(self, name)}")


def check_profile(config: TrainConfig) -> None:
    """Raise ConfigError for a profile that cannot be taken here."""
    if config.profile == "nvtx":
        check_nvtx()


@contextmanager
def profiling(
    config: TrainConfig, folder: Path, machine: Machine, model: nn.Module, sizes: BertConfig
) -> Iterator[None]:
    """Profile what is done within as `config.profile` says, into the run's `folder`. sizes: of the model's encoder.

    Of several ranks the first alone writes a profile.
    """
    if config.profile == "nvtx":
        ranges = NvtxRanges()
        with listening(ranges), ranges.modules(model):
            yield
    elif config.profile == "torch" and machine.world.is_main:
        encoder = EncoderSizes(sizes.num_hidden_layers, sizes.hidden_size, sizes.intermediate_size)
        profile = TorchProfile(
            folder,
            machine.device,
            machine.dtype,
            model,
            skip=config.profiling.skip_steps,
            active=config.profiling.active_steps,
            encoder=encoder,
            tokens=config.max_tokens,
        )
        with profile, listening(profile):
            yield
    else:
        yield

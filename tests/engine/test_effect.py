"""Settings that nothing would read are refused, with the switch that would make them count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mtbert.config import TrainConfig
from mtbert.engine.effect import check_effect
from mtbert.engine.pretraining import PretrainingConfig
from mtbert.engine.profiling import ProfilingConfig
from mtbert.errors import ConfigError
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.model.lora import LoraConfig
from mtbert.optim.adamw import OptimizerConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.optim.unfreezing import UnfreezingConfig

LORA = replace(TrainConfig().model, lora=LoraConfig(rank=4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"simcse": SimCseConfig(weight=0.5)},
            r"simcse.weight: 0.5 would have no effect.*simcse.tasks is empty",
        ),
        ({"smart": SmartConfig(divergence={"sst": "kl"})}, "smart.divergence"),
        ({"model": LORA}, "model.lora.rank: 4 would have no effect, because the mode is full.*rank 8"),
        ({"pretraining": PretrainingConfig(mlm_lr=1e-4)}, "pretraining.mlm_lr.*mlm_epochs is 0"),
        ({"pretraining": PretrainingConfig(mlm_epochs=1, task_epochs=2)}, "pretraining.task_epochs"),
        ({"unfreezing": UnfreezingConfig(epochs_per_layer=2)}, "unfreezing.epochs_per_layer.*gradual"),
        ({"surgery": SurgeryConfig(cagrad_c=0.1)}, "surgery.cagrad_c.*method is sum.*method cagrad"),
        ({"optim": OptimizerConfig(uncertainty_lr=0.1)}, "optim.uncertainty_lr.*uncertainty"),
        (
            {"profile": "nvtx", "profiling": ProfilingConfig(active_steps=9)},
            "profiling.active_steps: 9 would have no effect, because profile is nvtx; possible: profile torch",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_effect(TrainConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"simcse": SimCseConfig(tasks=["sst"], weight=0.5)},
        {"mode": "lora", "model": LORA},
        {"pretraining": PretrainingConfig(mlm_epochs=1, mlm_lr=1e-4)},
        {"surgery": SurgeryConfig(method="cagrad", cagrad_c=0.1)},
        {"profile": "torch", "profiling": ProfilingConfig(active_steps=9)},
        {"surgery": SurgeryConfig(method="uncertainty"), "optim": OptimizerConfig(uncertainty_lr=0.1)},
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    check_effect(TrainConfig(**settings))

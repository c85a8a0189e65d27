"""Settings that nothing would read are refused, with the switch that would make them count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mtbert.config import TrainConfig
from mtbert.curriculum import CurriculumConfig
from mtbert.engine.effect import check_effect
from mtbert.engine.evaluator import EvaluationConfig
from mtbert.engine.frozen_prefix import FrozenCacheConfig
from mtbert.engine.pretraining import PretrainingConfig
from mtbert.engine.profiling import ProfilingConfig
from mtbert.errors import ConfigError
from mtbert.losses.cosine_embedding import CosineEmbeddingConfig
from mtbert.losses.mnrl import MnrlConfig
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.model.build import ModelConfig
from mtbert.model.extra_hidden import ExtraHiddenConfig
from mtbert.model.lora import LoraConfig
from mtbert.model.pals import PalConfig
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
        (
            {"mode": "lora", "model": ModelConfig(trained_layers=2)},
            "model.trained_layers: 2 would have no effect, because the mode is lora; possible: mode full or bitfit",
        ),
        (
            {"frozen_cache": FrozenCacheConfig("never", most_gib=2.0)},
            "frozen_cache.most_gib: 2.0 would have no effect, because frozen_cache.use is never",
        ),
        ({"pretraining": PretrainingConfig(mlm_lr=1e-4)}, "pretraining.mlm_lr.*mlm_epochs is 0"),
        ({"pretraining": PretrainingConfig(mlm_epochs=1, task_epochs=2)}, "pretraining.task_epochs"),
        ({"unfreezing": UnfreezingConfig(epochs_per_layer=2)}, "unfreezing.epochs_per_layer.*gradual"),
        ({"surgery": SurgeryConfig(cagrad_c=0.1)}, "surgery.cagrad_c.*method is sum.*method cagrad"),
        ({"optim": OptimizerConfig(uncertainty_lr=0.1)}, "optim.uncertainty_lr.*uncertainty"),
        (
            {"profile": "nvtx", "profiling": ProfilingConfig(active_steps=9)},
            "profiling.active_steps: 9 would have no effect, because profile is nvtx; possible: profile torch",
        ),
        (
            {"model": ModelConfig(extra_hidden=ExtraHiddenConfig(layers=[0]))},
            r"model.extra_hidden.layers: \[0\] would have no effect, because model.extra_hidden.depth is 0",
        ),
        (
            {"model": ModelConfig(extra_hidden=ExtraHiddenConfig(activation="relu"))},
            "extra_hidden.activation",
        ),
        ({"model": ModelConfig(pals=PalConfig(heads=3))}, "model.pals.heads: 3 .*model.pals.size is 0"),
        ({"model": ModelConfig(pals=PalConfig(layers="last4"))}, "model.pals.layers: last4"),
        ({"mnrl": MnrlConfig(["para"], threshold=2.0)}, "mnrl.threshold: 2.0 .*no similarity .para."),
        (
            {"simcse": SimCseConfig(["sts"], threshold=2.0)},
            "simcse.threshold: 2.0 .*simcse.supervised is false; possible: simcse.supervised true",
        ),
        (
            {"simcse": SimCseConfig(["para"], supervised=True, threshold=2.0)},
            "simcse.threshold.*no similarity",
        ),
        (
            {"cosine_embedding": CosineEmbeddingConfig(["sts"], labels="extremes", threshold=1.0)},
            "cosine_embedding.threshold: 1.0 .*labels is extremes",
        ),
        (
            {"cosine_embedding": CosineEmbeddingConfig(["para"], labels="extremes")},
            "cosine_embedding.labels: extremes .*no similarity .para.",
        ),
        (
            {"evaluation": EvaluationConfig(every="phase")},
            "evaluation.every: phase .* found curriculum.mixing parallel with tasks sst, para, sts; possible: epoch",
        ),
        (
            {
                "evaluation": EvaluationConfig(every="phase"),
                "tasks": ["sst"],
                "curriculum": CurriculumConfig(mixing="sequential"),
            },
            "evaluation.every: phase .* sequential with tasks sst; possible: epoch",
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
        {"model": ModelConfig(extra_hidden=ExtraHiddenConfig(depth=1, layers=[0]))},
        {"model": ModelConfig(pals=PalConfig(size=12, heads=3))},
        {"mnrl": MnrlConfig(["para", "sts"], threshold=2.0)},
        {"simcse": SimCseConfig(["sts"], supervised=True, threshold=2.0)},
        {"cosine_embedding": CosineEmbeddingConfig(["sts"], threshold=1.0)},
        {
            "evaluation": EvaluationConfig(every="phase"),
            "curriculum": CurriculumConfig(mixing="sequential"),
        },
    ],
)
def test_accepted(settings: dict[str, Any]) -> None:
    check_effect(TrainConfig(**settings))

"""Gradient checkpointing changes no bit of a training step's gradient, whatever is trained and however."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.assembly import assemble, tiny_config
from support.tiny_bert import write_tiny_bert

from mtbert.config import TrainConfig
from mtbert.engine.assembly import assemble as assemble_run
from mtbert.engine.effect import check_effect
from mtbert.engine.mlm_run import build_mlm_model, mlm_data
from mtbert.engine.pretraining import PretrainingConfig, stages
from mtbert.errors import ConfigError
from mtbert.kernels import dispatch, extension
from mtbert.losses.simcse import SimCseConfig
from mtbert.losses.smart import SmartConfig
from mtbert.model import CheckpointingConfig, ExtraHiddenConfig, HeadConfig, LoraConfig, PalConfig
from mtbert.model.lora import PROJECTIONS
from mtbert.optim.mixout import MixoutConfig
from mtbert.optim.surgery import SurgeryConfig
from mtbert.tasks.config import TaskConfig

LORA = LoraConfig(rank=2, projections=list(PROJECTIONS))  # type: ignore[arg-type]
PALS, EXTRA = PalConfig(size=12, heads=3), ExtraHiddenConfig(2)
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "several passes": {"max_tokens": 160},
    "mean pooling": {"pooling": "mean"},
    "mean pooling of one task": {"pooling": {"sts": "mean"}, "surgery": SurgeryConfig(method="pcgrad")},
    "bitfit": {"mode": "bitfit"},
    "lora": {"mode": "lora", "lora": LORA},
    "lora of one layer, frozen below": {"mode": "lora", "lora": replace(LORA, layers=[2])},
    "lora of each task, pals": {"mode": "lora", "lora": replace(LORA, per_task=True), "pals": PALS},
    "pals and extra hidden": {"pals": PALS, "extra_hidden": EXTRA},
    "pcgrad": {"surgery": SurgeryConfig(method="pcgrad"), "max_tokens": 400},
    "pcgrad, lora": {"surgery": SurgeryConfig(method="pcgrad"), "mode": "lora", "lora": LORA},
    "pcgrad, pals and extra hidden": {
        "surgery": SurgeryConfig(method="pcgrad"),
        "pals": PALS,
        "extra_hidden": EXTRA,
    },
    "pcgrad, a pass a task": {"surgery": SurgeryConfig(method="pcgrad", gradients="per-task")},
    "smart": {"smart": SmartConfig(tasks=["sst", "sts"], steps=2)},
    "smart, same masks": {"smart": SmartConfig(tasks=["sst"], masks="same"), "mode": "lora", "lora": LORA},
    "smart, pcgrad": {"smart": SmartConfig(tasks=["para"]), "surgery": SurgeryConfig(method="pcgrad")},
    "simcse, mixout": {"simcse": SimCseConfig(tasks=["sst"]), "mixout": MixoutConfig(p=0.3)},
    "simcse, smart, pcgrad, pals": {
        "simcse": SimCseConfig(tasks=["sst"]),
        "smart": SmartConfig(tasks=["para"]),
        "surgery": SurgeryConfig(method="pcgrad"),
        "pals": PALS,
    },
}


@pytest.fixture(scope="session")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four-layers")
    write_tiny_bert(folder, layers=4)
    return folder


def config_of(
    bert: Path, cache: Path, checkpointing: CheckpointingConfig, pooling: Any = "cls", **changes: Any
) -> TrainConfig:
    """pooling: of all heads, or of each task that has another than `cls`."""
    model = {name: changes.pop(name) for name in ("lora", "pals", "extra_hidden") if name in changes}
    tasks = {
        name: TaskConfig(
            batch_size=6,
            max_length=64,
            head=HeadConfig(pooling=pooling if isinstance(pooling, str) else pooling.get(name, "cls")),
        )
        for name in ("sst", "para", "sts")
    }
    config = tiny_config(bert, cache, task=tasks, checkpointing=checkpointing, **changes)
    config.model = replace(config.model, **model)
    return config


def gradients(config: TrainConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The gradient of the second step: after one update nothing is at its initial zero."""
    assembly = assemble(config, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    assembly.step.forward.dtype = dtype  # type: ignore[misc]
    assert assembly.model.encoder.checkpointing == config.checkpointing
    plan = {name: batches.batch(0) for name, batches in assembly.batches.items()}
    assembly.step(plan, 0).check()
    assembly.step.accumulate(plan, 1)
    return {n: p.grad.clone() for n, p in assembly.model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["auto", "reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu" and extension.part("cpu") is None:
        pytest.skip(extension.problem)
    with dispatch.use_backend(request.param):
        yield request.param


def assert_bit_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("mode", ["layers", "selective"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_gradient_is_the_same_bit_for_bit(
    four_layers: Path, tmp_path: Path, mode: str, changes: dict[str, Any]
) -> None:
    plain = gradients(config_of(four_layers, tmp_path, CheckpointingConfig(), **dict(changes)), torch.float32)
    again = CheckpointingConfig(mode)  # type: ignore[arg-type]
    assert_bit_equal(
        gradients(config_of(four_layers, tmp_path, again, **dict(changes)), torch.float32), plain
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "checkpointing",
    [CheckpointingConfig("layers"), CheckpointingConfig("layers", 2), CheckpointingConfig("selective")],
    ids=str,
)
def test_with_every_backend_and_type(
    four_layers: Path, tmp_path: Path, backend: str, checkpointing: CheckpointingConfig, dtype: torch.dtype
) -> None:
    changes: dict[str, Any] = {
        "surgery": SurgeryConfig(method="pcgrad"),
        "mode": "lora",
        "lora": LORA,
        "kernels": backend,
    }
    plain = gradients(config_of(four_layers, tmp_path, CheckpointingConfig(), **changes), dtype)
    assert_bit_equal(gradients(config_of(four_layers, tmp_path, checkpointing, **changes), dtype), plain)


# ---- settings ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"checkpointing": CheckpointingConfig(every=2)},
            "checkpointing.every: 2 would have no effect.*mode is none",
        ),
        (
            {"mode": "last-linear-layer", "checkpointing": CheckpointingConfig("layers")},
            "checkpointing.mode: layers would have no effect.*last-linear-layer has no backward pass",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_effect(TrainConfig(**settings))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CheckpointingConfig("all"),
            r"checkpointing.mode: found 'all'; possible: none, layers, selective",
        ),  # type: ignore[arg-type]
        (lambda: CheckpointingConfig("layers", 0), "checkpointing.every: expected at least 1, found 0"),
        (lambda: CheckpointingConfig("layers").layer_numbers(1), "an encoder of one layer"),
        (
            lambda: CheckpointingConfig("layers", 4).layer_numbers(4),
            "checkpointing.every: found 4.*possible: 1 to 3",
        ),
    ],
)
def test_impossible_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_which_layers_are_computed_again() -> None:
    assert CheckpointingConfig().layer_numbers(6) == []
    assert CheckpointingConfig("layers").layer_numbers(6) == [0, 1, 2, 3, 4]
    assert CheckpointingConfig("selective", 2).layer_numbers(6) == [0, 2, 4]


def test_layers_that_no_backward_pass_reaches_are_refused(four_layers: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"mode": "lora", "lora": replace(LORA, layers=[3])}
    layers = CheckpointingConfig("layers")
    config = config_of(four_layers, tmp_path, layers, **dict(changes))
    with pytest.raises(
        ConfigError, match=r"checkpointing.mode: layers would have no effect.*nothing below layer 3"
    ):
        assemble_run(config)
    smart = config_of(four_layers, tmp_path, layers, smart=SmartConfig(tasks=["sst"]), **dict(changes))
    assemble_run(smart)


def test_stages_before_the_run_have_it_too(four_layers: Path, tmp_path: Path) -> None:
    layers = CheckpointingConfig("layers", 2)
    config = config_of(
        four_layers, tmp_path, layers, pretraining=PretrainingConfig(mlm_epochs=1, task="para")
    )
    planned = stages(config, tmp_path)
    assert [stage.config.checkpointing for stage in planned] == [layers, layers]
    mlm = planned[0].config
    assert build_mlm_model(mlm, four_layers, mlm_data(mlm, four_layers)).encoder.checkpointing == layers

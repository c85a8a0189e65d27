"""The optimizer's moments as named tensors."""

from __future__ import annotations

import torch
from torch import nn

from mtbert.engine.optimizer_state import optimizer_tensors, restore_optimizer
from mtbert.optim.adamw import OptimizerConfig, build_optimizer


def test_everything_comes_back_on_the_parameters_device_step_counter_included() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = optimizer_tensors(optimizer, model)
    assert set(saved) == {f"{p}/{e}" for p in ("weight", "bias") for e in ("step", "exp_avg", "exp_avg_sq")}

    elsewhere = nn.Linear(3, 2, device="meta")
    other = torch.optim.AdamW(elsewhere.parameters())
    restore_optimizer(other, elsewhere, saved)
    assert {value.device.type for state in other.state.values() for value in state.values()} == {"meta"}


def test_restored_moments_are_copies() -> None:
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    saved = {name: value.clone() for name, value in optimizer_tensors(optimizer, model).items()}
    kept = {name: value.clone() for name, value in saved.items()}
    restore_optimizer(optimizer, model, saved)
    optimizer.step()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)

"""The optimizer's moments as named tensors, so that a checkpoint needs no pickle and no parameter order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`{parameter}/{entry}` (exp_avg, exp_avg_sq, step) of every parameter that has been stepped."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave. Raises KeyError for a name that the model does not train."""
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in trained}
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = value
    optimizer.state.clear()
    for name, entries in states.items():
        parameter = parameters[name]
        # Everything on the parameter's device, `step` too: the fused kernel reads it there.
        optimizer.state[parameter] = {
            entry: value.to(parameter.device, copy=True) for entry, value in entries.items()
        }

"""How much memory activations take: the most that a call has allocated at once, beyond what was there before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mtbert.curriculum import Plan
from mtbert.engine.step import TrainStep


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors that `call` has had at once, without those that existed before.

    On a CPU the profiler notes every allocation of torch's; the scratch memory of a library's product isn't among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    now = most = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def activation_bytes(step: TrainStep, plan: Plan, device: torch.device) -> tuple[int, int]:
    """Useful tokens of a step of `plan`, and the peak of its forward and backward passes.

    Weights and optimizer state are there before and don't count; nor do gradients, which are there too, so that what
    remains of them is the one that is just being added.
    """
    tokens = step.accumulate(plan, 0).tokens
    zero_grad = step.optimizer.zero_grad
    step.optimizer.zero_grad = lambda set_to_none=True: zero_grad(set_to_none=False)  # type: ignore[method-assign]
    try:
        return tokens, peak_bytes(lambda: step.accumulate(plan, 1), device)
    finally:
        step.optimizer.zero_grad = zero_grad  # type: ignore[method-assign]

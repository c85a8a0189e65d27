"""The most memory that a run has held."""

from __future__ import annotations

import sys

import torch


def forget_peak(device: torch.device) -> None:
    """Begin to count anew, where that is possible: on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str] | None:
    """Bytes, and of what they are the peak; None where the system does not say.

    On a GPU: tensors, since `forget_peak`. On a CPU: the whole process, since its start.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the device during these steps"
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the process since its start"

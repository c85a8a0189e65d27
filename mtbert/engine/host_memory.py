"""Freed memory: kept in the process between the steps of a training, given back between trainings."""

from __future__ import annotations

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # the names and numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from its heap and not to give them back between steps.

    Training on a CPU allocates the same large tensors at every step. By default a block above 32 MiB (an embedding
    gradient, a feed-forward activation) is mapped anew at each allocation, and the kernel clears its pages one fault at
    a time. Returns whether the C library took it; elsewhere nothing changes but speed.
    """
    library = _glibc()
    if library is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all([library.mallopt(name, value) == 1 for name, value in settings])


def give_back_freed_memory() -> bool:
    """Collect what a training left in cycles (its model among it), and give the free pages to the system.

    Else the next training of the process begins while the last one's tensors still lie there. Returns whether the C
    library was asked.
    """
    gc.collect()
    library = _glibc()
    if library is None:
        return False
    library.malloc_trim(ctypes.c_size_t(0))
    return True


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is that of GNU."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None

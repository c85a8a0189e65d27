"""Keep freed memory in the process: training on a CPU allocates the same large tensors at every step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # the names and numbers of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to serve large blocks from its heap and not to give them back between steps.

    By default a block above 32 MiB (an embedding gradient, a feed-forward activation) is mapped anew at each
    allocation, and the kernel clears its pages one fault at a time. Returns whether the C library took it;
    elsewhere nothing changes but speed.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version") or not hasattr(library, "mallopt"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all([library.mallopt(name, value) == 1 for name, value in settings])

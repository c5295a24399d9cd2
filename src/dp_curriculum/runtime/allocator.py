"""Memory that is freed is kept for the next tensor, instead of going back to the kernel and coming as new pages."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_BLOCK, _KEPT = 2**30, 2**31 - 1
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str] = os.environ) -> bool:
    """
    Lets glibc keep blocks of up to 1 GiB for the next ones, for as long as the process lives.

    A training on a CPU frees and asks for the same tensors in each pass. Of a step, the kernel took 7 % of the time
    for pages that it fills with zeros, and takes 1 % with this; the process keeps what it needed at its peak.

    Returns:
        `bool`: Whether it was done: on Linux with glibc, where the environment says nothing of its own.
    """
    if not sys.platform.startswith("linux") or any(environment.get(name) for name in _SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))

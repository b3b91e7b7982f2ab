"""What the C library does with memory that a step has freed and the next step asks for again."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h of glibc


def keep_freed_memory() -> None:
    """Have freed memory kept by this process rather than given back to the system.

    glibc maps every large tensor anew and unmaps it when it is freed, so that each step faults in gigabytes page by
    page: an eighth of a training step on a CPU. Kept, the same pages serve the next step. The process then holds on
    to the peak of its memory until it ends. Does nothing where the C library has no such setting.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never

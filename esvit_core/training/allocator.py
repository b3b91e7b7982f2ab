"""Keep freed memory in the process, so that the next training step reuses it."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h of glibc


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    By default glibc maps every large tensor anew and unmaps it when it is freed, so each step faults in gigabytes page
    by page, which takes an eighth of a training step on a CPU. With this setting the next step reuses the same pages,
    and the process holds its peak memory until it ends. Without glibc this function does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never

"""Let the threads that read and decode images share one heap, so that memory does not grow with the number of images."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of mallopt in glibc


def share_heap() -> None:
    """Limit glibc to one heap for the threads that start from now on; nothing with another C library.

    By default each of up to eight threads per core gets a heap. Freed memory stays in the heap in which it was allocated,
    and the small allocations of a few thousand images pin it: with 16 threads, 3 kB for each image of a preparation.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)

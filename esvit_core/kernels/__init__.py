"""Fused CPU kernels in C, compiled on first use: ``fused_softmax.c``, ``window_attention.h``, ``crop_resize.c``, ``photometric.c``.

An installation may include them precompiled for the levels x86-64-v3 and x86-64-v4 (``build.py``); the container images
do. Otherwise they are compiled for the local CPU on first use, if there is a C compiler (``compiled.py``). Without a compiler torch
computes the same up to float32 rounding; a training is therefore reproducible bit for bit between machines that use the
same kernels.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit_core.kernels.build import LEVELS, SOURCES, file_name, find_compiler
from esvit_core.kernels.compiled import compiled_library

logger = logging.getLogger(__name__)


class WindowAttentionArgs(ctypes.Structure):
    """``struct args`` of ``window_attention.h``."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("is_bf16", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fill", "index", "bias", "mask")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("L", "windows", "heads", "N")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None if there are none for this CPU and no C compiler can build them."""
    loaded = _load_prebuilt(SOURCES, _cpu_flags()) or _compile()
    if loaded is None:
        return None
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    loaded.teacher_softmax.argtypes = [pointer, flag, size, pointer, real, pointer, size, pointer]
    loaded.soft_cross_entropy.argtypes = [
        pointer,
        size,
        flag,
        size,
        real,
        pointer,
        pointer,
        size,
        pointer,
        pointer,
        pointer,
    ]
    args = ctypes.POINTER(WindowAttentionArgs)
    for attend, backward in (
        (loaded.attend_32, loaded.attend_backward_32),
        (loaded.attend_64, loaded.attend_backward_64),
    ):
        attend.argtypes = [args, size, size, pointer, pointer]
        backward.argtypes = [args, size, size, pointer, pointer, pointer, pointer, pointer]
    if hasattr(loaded, "make_crops"):  # not without AVX2
        loaded.make_crops.argtypes = [pointer, size, size, pointer, size, pointer, pointer]
    return loaded


def _load_prebuilt(folder: Path, cpu_flags: frozenset[str]) -> ctypes.CDLL | None:
    """Load the library in ``folder`` for the highest level that a CPU with these features supports."""
    for level, required in LEVELS.items():
        path = folder / file_name(level)
        if required <= cpu_flags and path.exists():
            logger.info("CPU kernels: %s", path)
            return ctypes.CDLL(str(path))
    return None


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU features that Linux reports; empty on other systems than Linux on x86."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _compile() -> ctypes.CDLL | None:
    """Compile and load the kernels for this CPU; None if there is no working compiler."""
    compiler = find_compiler()
    if not compiler:
        return None
    try:
        return compiled_library(compiler, _cpu_flags())
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", b"") or str(error).encode()
        logger.info(
            "CPU kernels: %s failed to compile them, torch computes instead: %s", compiler, output.decode().strip()
        )
        return None


def call(name: str, jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call a function of the library once per job, on as many threads as torch uses.

    Args:
        name: name of the function.
        jobs: arguments of each call, with tensors in place of pointers.

    Raises:
        MemoryError: a job could not allocate its working memory.
    """
    function = getattr(library(), name)

    def run(job: tuple[Any, ...]) -> int:
        return int(function(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in job)))

    threads = torch.get_num_threads()
    if any(map(run, jobs) if threads == 1 else _threads(threads).map(run, jobs)):
        raise MemoryError(f"{name}: out of memory")


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="c_kernel")

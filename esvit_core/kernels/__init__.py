"""Fused CPU kernels in C: ``rows.c`` and ``windows.h``.

An installation may bring them compiled, for the levels x86-64-v3 and x86-64-v4 (``build.py``; the container images do).
Elsewhere they are compiled for this very processor when a process first asks, if there is a C compiler. Without either,
torch computes the same to the rounding of float32, so a training is repeated bit for bit on machines with the same kernels.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esvit_core.kernels.build import LEVELS, SOURCES, compile_kernels, file_name, find_compiler

logger = logging.getLogger(__name__)


class Windows(ctypes.Structure):
    """``given`` of ``windows.h``."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("half", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("fill", "index", "bias", "mask")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("L", "windows", "heads", "N")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none for this processor and no C compiler can make them."""
    found = _load_prebuilt(SOURCES, _cpu_flags()) or _compile()
    if found is None:
        return None
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    found.sharpen.argtypes = [pointer, flag, size, pointer, real, pointer, size, pointer]
    found.compare.argtypes = [pointer, size, flag, size, real, pointer, pointer, size, pointer, pointer, pointer]
    given = ctypes.POINTER(Windows)
    for attend, backward in ((found.attend_32, found.attend_backward_32), (found.attend_64, found.attend_backward_64)):
        attend.argtypes = [given, size, size, pointer, pointer]
        backward.argtypes = [given, size, size, pointer, pointer, pointer, pointer, pointer]
    return found


def _load_prebuilt(folder: Path, cpu_flags: frozenset[str]) -> ctypes.CDLL | None:
    """The library in a folder for the widest level that a processor with these features has."""
    for level, needed in LEVELS.items():
        path = folder / file_name(level)
        if needed <= cpu_flags and path.exists():
            logger.info("CPU kernels: %s", path)
            return ctypes.CDLL(str(path))
    return None


def _cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What Linux says the processor can do; nothing where it is not Linux on x86."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _compile() -> ctypes.CDLL | None:
    """The kernels, compiled for this processor; None without a compiler that can."""
    compiler = find_compiler()
    if not compiler:
        return None
    try:
        with tempfile.TemporaryDirectory() as folder:  # a second; what is kept would have to be trusted later
            binary = Path(folder) / "esvit.so"
            compile_kernels(compiler, "native", binary)
            return ctypes.CDLL(str(binary))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        logger.info("CPU kernels: torch computes instead: %s did not compile them: %s", compiler, said.decode().strip())
        return None


def call(name: str, jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call a function of the library with the arguments of each job, as many at a time as torch has threads.

    Args:
        jobs: tensors in place of pointers.

    Raises:
        MemoryError: a job could not have the memory it works in.
    """
    function = getattr(library(), name)

    def run(job: tuple[Any, ...]) -> int:
        return int(function(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in job)))

    threads = torch.get_num_threads()
    if any(map(run, jobs) if threads == 1 else _threads(threads).map(run, jobs)):
        raise MemoryError(f"no memory for {name}")


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number, thread_name_prefix="compiled")

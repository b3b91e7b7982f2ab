"""What torch computes in many operations, in one, for a processor: ``rows.c`` and ``windows.h``.

They are compiled when a process first asks, for this very processor, if there is a C compiler. Elsewhere torch computes
the same to the rounding of float32, so a training is repeated bit for bit where the same of the two is at hand.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Loops over a row as wide as the processor allows; no -ffast-math, which changes how the whole process rounds.
_FLAGS = ("-O3", "-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")

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
    """The compiled functions; None where there is no C compiler, or none that can do it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    sources = [str(path) for path in sorted(Path(__file__).parent.glob("*.c"))]
    try:
        with tempfile.TemporaryDirectory() as folder:  # a second; what is kept would have to be trusted later
            binary = Path(folder) / "esvit.so"
            command = [*shlex.split(compiler), *_FLAGS, *sources, "-o", str(binary), "-lm"]
            subprocess.run(command, check=True, capture_output=True)
            found = ctypes.CDLL(str(binary))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", b"") or str(error).encode()
        logger.info("torch computes what is in %s: %s did not compile it: %s", sources, compiler, said.decode().strip())
        return None
    pointer, size, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    found.sharpen.argtypes = [pointer, flag, size, pointer, real, pointer, size, pointer]
    found.compare.argtypes = [pointer, size, flag, size, real, pointer, pointer, size, pointer, pointer, pointer]
    given = ctypes.POINTER(Windows)
    for attend, backward in ((found.attend_32, found.attend_backward_32), (found.attend_64, found.attend_backward_64)):
        attend.argtypes = [given, size, size, pointer, pointer]
        backward.argtypes = [given, size, size, pointer, pointer, pointer, pointer, pointer]
    return found


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

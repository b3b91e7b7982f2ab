"""Describe the hardware of a benchmark, and measure its peak memory."""

from __future__ import annotations

import contextlib
import datetime
import resource
import sys
from pathlib import Path

import torch

from esvit_core.runs.environment import hardware

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe(device: torch.device) -> str:
    """Describe hardware, threads, version of torch and date, for the first line of a table."""
    found = hardware()
    where = f"{torch.get_num_threads()} threads of {found['processor']}"
    if device.type == "cuda":
        where = str(found["gpu"])
    return f"{where}, torch {torch.__version__}, {datetime.date.today()}"


def reset_peak_memory(device: torch.device) -> int:
    """Reset the peak, and return the memory in use now, bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):  # outside Linux, the peak stays the one since the start of the process
        _CLEAR.write_text("5", encoding="ascii")
    return _from_status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Peak memory since :func:`reset_peak_memory`, bytes: torch's on a GPU, otherwise resident memory."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _from_status("VmHWM")


def _from_status(entry: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

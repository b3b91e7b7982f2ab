"""The environment of a training: usable cores, hardware, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch

# Environment variables that have to be set before torch is imported.
TORCH_ENVIRONMENT = {
    # Required for deterministic matrix products on GPUs.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # An idle OpenMP thread spins for 0.2 ms instead of 3 ms, during which it slows down other threads.
    "GOMP_SPINCOUNT": "20000",
}
ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def allocator_variables(settings: str | None) -> dict[str, str]:
    """Return the environment with the settings of torch's allocator of GPU memory (``launch.allocator``)."""
    return {} if settings is None else {ALLOCATOR_VARIABLE: settings}


def available_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of cores that this process may use, by its affinity and its cgroup quota (a pod's limit).

    Args:
        groups: mount point of the cgroups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A quota below one core counts as one core; -1 and max mean no quota.
    for files in (
        ("cpu.max",),
        ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"),
    ):  # cgroup versions 2 and 1
        try:
            quota, period = " ".join((groups / file).read_text(encoding="ascii") for file in files).split()
            if quota not in ("max", "-1"):
                cores = min(cores, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            continue
    return max(1, cores)


def versions() -> dict[str, str]:
    """Return the versions of Python, this library, and the numerical packages."""
    from esvit_core import __version__

    found = {"python": platform.python_version(), "esvit": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str | int | float]:
    """Return processor, cores, memory and GPUs; no host names."""
    import torch

    found: dict[str, str | int | float] = {"processor": _processor(), "cores": available_cores()}
    found["memory_gib"] = round(psutil.virtual_memory().total / 2**30, 1)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["gpus"] = torch.cuda.device_count()
    return found


def device_memory(device: torch.device) -> dict[str, float]:
    """Return the bytes ``used`` on the device by all processes, the ``peak`` of this process, and the ``total``.

    For a CPU this is the machine's memory, and the peak is that of the process's resident set.
    """
    import torch

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"used": total - free, "peak": torch.cuda.max_memory_allocated(device), "total": total}
    machine = psutil.virtual_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"used": machine.total - machine.available, "peak": peak, "total": machine.total}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model.group(1).strip() if model else platform.processor() or platform.machine()

"""The GPUs of this machine, and an error where torch cannot use them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from esvit_core.config import Config
from esvit_core.config.cluster_settings import Role
from esvit_core.errors import UserError

DEVICES = Path("/dev")  # folder of the device files, one per NVIDIA GPU
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide every GPU


def accelerators_setting(config: Config, role: Role) -> str:
    """Return the setting that gives the pods of a kind of step GPUs; "" if it gives none, or outside a cluster."""
    in_pod = "KUBERNETES_SERVICE_HOST" in os.environ
    return f"cluster.{role}.accelerators" if in_pod and config.cluster.pod(role).accelerators else ""


def require_usable_gpus(requested: str = "") -> None:
    """Return if torch can use the GPUs of this machine, or if it has none.

    Otherwise the work would run on the CPU, many times slower, and nobody would notice. ``CUDA_VISIBLE_DEVICES=""`` states
    that this is wanted.

    Args:
        requested: setting by which this process's pod was given GPUs; "": none is known.

    Raises:
        UserError: torch can use no GPU although there is one, or although the pod was given some.
    """
    present = any(DEVICES.glob("nvidia[0-9]*"))
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN or not (present or requested) or torch.cuda.is_available():
        return
    subject = "this machine has a GPU" if present else f"{requested}: this pod was given GPUs"
    raise UserError(
        f"{subject}, and torch {torch.__version__} can use none ({_problem()}); install a driver and a torch that "
        'fit each other, or set CUDA_VISIBLE_DEVICES="" to compute on the CPU'
    )


def computing_devices(requested: str = "") -> list[torch.device]:
    """Return all GPUs, or the CPU if there is none.

    Raises:
        UserError: see :func:`require_usable_gpus`.
    """
    require_usable_gpus(requested)
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", i) for i in range(number)] or [torch.device("cpu")]


def computing_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none.

    Raises:
        UserError: see :func:`require_usable_gpus`.
    """
    return computing_devices()[0]


def _problem() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "it is built for CPUs only"
    try:
        torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError or DeferredCudaCallError
        return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return "it finds no GPU"

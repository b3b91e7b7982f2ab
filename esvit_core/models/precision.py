"""Precision of the networks: bfloat16 where the hardware supports it natively, otherwise float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from esvit_core.cpu_flags import cpu_bfloat16


@dataclass(frozen=True)
class Precision:
    """Precision of the networks; the loss and the weights are always float32.

    Attributes:
        dtype: dtype of matrix products and convolutions.
        reason: why this dtype was chosen, in a few words.
    """

    dtype: torch.dtype
    reason: str
    device_type: str

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def autocast(self, cache: bool = True) -> AbstractContextManager[object]:
        """Return the context manager for the forward passes of the networks.

        Args:
            cache: keep converted weights until its end.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype, cache_enabled=cache)


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Resolve ``training.precision`` on this machine.

    Args:
        requested: ``auto``, ``float32`` or ``bfloat16``.
    """
    native = _native_bfloat16(device)
    if requested == "float32" or (requested == "auto" and not native):
        why = "as configured" if requested == "float32" else "bfloat16 is not native here"
        return Precision(torch.float32, why, device.type)
    return Precision(torch.bfloat16, native or "as configured, but not native here: slow", device.type)


def _native_bfloat16(device: torch.device) -> str:
    """Return the name of the hardware that computes bfloat16 natively, or an empty string."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    return cpu_bfloat16()

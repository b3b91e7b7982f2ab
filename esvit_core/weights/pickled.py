"""Read files of ``torch.save`` without executing code in them.

torch's restricted unpickler creates only tensors and plain values. Published checkpoints contain two more types, which
are allowed by name: the ``argparse.Namespace`` of the command line, and NumPy numbers (values of the schedules in the
optimizer's groups), which are decoded from their bytes without NumPy.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from esvit_core.errors import UserError

_REFUSED = re.compile(r"GLOBAL (\S+) (?:was not an allowed|whose module)")


class _NumpyType:
    """Stand-in for ``numpy.dtype``: type code and byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"


_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B", "b1": "?"}


def _numpy_number(kind: _NumpyType, data: Any) -> float | int | bool:
    """Stand-in for ``numpy.core.multiarray.scalar``: decode a number from its bytes."""
    if not isinstance(kind, _NumpyType) or kind.code not in _FORMATS:
        raise pickle.UnpicklingError("a NumPy value that is not a number")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return struct.unpack(kind.order + _FORMATS[kind.code], raw)[0]


# Lightning keeps the hyperparameters of a module in a dictionary of its own class.
_LIGHTNING_DICTIONARIES = (
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_ALLOWED: list[Any] = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),  # NumPy 2
    *((dict, name) for name in _LIGHTNING_DICTIONARIES),
]


def load_pickled(path: Path) -> Any:
    """Load a file of ``torch.save``: tensors on the CPU, plain values, argument namespaces.

    Raises:
        UserError: the file does not exist, was not written by torch, is damaged, or would call other functions while it
            is read.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; expected a file of torch.save or safetensors")
    try:
        # With mmap, unused parts are never read.
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch.load does not document its exceptions
        raise UserError(f"checkpoint {path}: {_explain(error, path)}") from None


def _explain(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    if refused := _REFUSED.search(text):
        return (
            f"refused, because reading it would call {refused[1]}; nothing was executed. Expected tensors, plain values and "
            "argparse.Namespace; save only its state dict, on a machine where you trust the file"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or (not zipfile.is_zipfile(path) and start[:1] == b"\x80"):
        reason = text.partition(". ")[0][:160]
        return f"damaged, or not a checkpoint ({size:,} bytes; {reason}); copy it again and compare the sizes"
    return f"not a file of torch.save ({size:,} bytes); expected .pth, .pt or .safetensors"

"""Read a file that torch wrote without running what may be hidden in it.

torch's restricted unpickler makes tensors and plain values only. What published checkpoints hold beside them is
allowed by name: the ``argparse.Namespace`` of the command line, and NumPy's numbers (the schedules' values in the
optimizer's groups), which are made without NumPy from their bytes.
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
    """In place of ``numpy.dtype``: the type's code and its byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else "<"


_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u1": "B", "b1": "?"}


def _numpy_number(kind: _NumpyType, data: Any) -> float | int | bool:
    """In place of ``numpy.core.multiarray.scalar``: a number from its bytes."""
    if not isinstance(kind, _NumpyType) or kind.code not in _FORMATS:
        raise pickle.UnpicklingError("a NumPy value that is no number")
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return struct.unpack(kind.order + _FORMATS[kind.code], raw)[0]


_ALLOWED: list[Any] = [
    argparse.Namespace,
    (_NumpyType, "numpy.dtype"),
    (_numpy_number, "numpy.core.multiarray.scalar"),
    (_numpy_number, "numpy._core.multiarray.scalar"),  # NumPy 2
]


def load_pickled(path: Path) -> Any:
    """What ``torch.save`` put into a file: tensors on the CPU, plain values, argument namespaces.

    Raises:
        UserError: there is no such file, it was not written by torch, it is damaged, or it asks for anything else to
            be called while it is read, which is not done.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; expected a file that torch.save or safetensors wrote")
    try:
        # Mapped, the parts that nobody asks for are never read.
        with torch.serialization.safe_globals(_ALLOWED), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # torch.load promises no particular one
        raise UserError(f"checkpoint {path}: {_explain(error, path)}") from None


def _explain(error: Exception, path: Path) -> str:
    text = " ".join(str(error).split())
    if refused := _REFUSED.search(text):
        return (
            f"refused, for reading it would call {refused[1]}; nothing of it was run. Expected tensors, plain values and "
            "argparse.Namespace; save its state dict alone, or use it only where you trust its author"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or (not zipfile.is_zipfile(path) and start[:1] == b"\x80"):
        reason = text.partition(". ")[0][:160]
        return f"damaged, or no checkpoint ({size:,} bytes; {reason}); copy it again, and compare the sizes"
    return f"no file that torch wrote ({size:,} bytes); expected one of torch.save (.pth, .pt) or a .safetensors"

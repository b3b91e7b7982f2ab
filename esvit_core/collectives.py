"""Report the loss of another process in a collective operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import OutOfMemoryError

from esvit_core.errors import LostPeerError


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Wrap calls of ``torch.distributed``.

    Raises:
        LostPeerError: another process did not take part. gloo raises a plain ``RuntimeError`` for this, NCCL a
            subclass.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostPeerError(f"another training process was lost ({str(error).splitlines()[0]})") from error

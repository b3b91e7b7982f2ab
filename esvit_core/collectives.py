"""What happens to a collective operation when another of the processes has gone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import OutOfMemoryError

from esvit_core.errors import LostPeerError


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Around calls of ``torch.distributed``.

    Raises:
        LostPeerError: another process did not take part. gloo says so with a plain ``RuntimeError``, NCCL with a
            subclass.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise LostPeerError(f"another training process was lost ({str(error).splitlines()[0]})") from error

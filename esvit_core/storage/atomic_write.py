"""Files and folders of the user's that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esvit_core.errors import UserError


def require_absent(out: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Make sure that ``out`` can be made, before the work.

    Args:
        out: file or folder.
        suffixes: one of which its name must end in; empty: any.

    Raises:
        UserError: it is there already, has another suffix, or its folder cannot be made.
    """
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    try:
        if out.exists() or out.is_symlink():
            raise UserError(f"--out {out}: is there already; remove it, or name another place")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror}); name another place") from None


@contextmanager
def atomic_write(out: Path) -> Iterator[Path]:
    """A path beside ``out`` to write to, which takes its name if all goes well and vanishes otherwise.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".esvit-", dir=out.parent) as folder:
            path = Path(folder) / out.name
            yield path
            path.rename(out)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); make room, or name another place"
        ) from None

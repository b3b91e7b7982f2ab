"""Write files and folders of the user atomically: complete or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esvit_core.errors import UserError


def require_absent(out: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Check that ``out`` can be created, before starting the work.

    Args:
        out: file or folder.
        suffixes: suffixes of which its name must have one; empty: any.

    Raises:
        UserError: ``out`` exists, has another suffix, or its folder cannot be created.
    """
    if suffixes and out.suffix not in suffixes:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(suffixes)}")
    try:
        if out.exists() or out.is_symlink():
            raise UserError(f"--out {out}: already exists; remove it, or choose another path")
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot create its folder ({error.strerror}); choose another path") from None


@contextmanager
def atomic_write(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``out``, which is renamed to ``out`` on success and removed otherwise.

    Raises:
        UserError: the file or folder cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".esvit-", dir=out.parent) as folder:
            path = Path(folder) / out.name
            yield path
            path.rename(out)
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror or error}); free some space, or choose another path"
        ) from None

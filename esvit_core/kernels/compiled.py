"""The kernels compiled for the local CPU: once per user, compiler and sources, in a folder that only this user can write.

The folder is ``ESVIT_KERNEL_DIR``, otherwise ``esvit/kernels`` in the user's cache folder, otherwise a private folder below
the temporary directory. A library is loaded only with the checksum that was written when it was compiled.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from esvit_core.errors import UserError
from esvit_core.kernels.build import FLAGS, compile_kernels, file_name
from esvit_core.private_folders import folder_problem, private_folder

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "ESVIT_KERNEL_DIR"
_KEPT = 8  # libraries, of other compilers, CPUs or versions


def compiled_library(compiler: str, cpu_flags: Iterable[str]) -> ctypes.CDLL:
    """Load the kernels for this CPU, compiling them if they are not there; concurrent processes wait for the first.

    Args:
        compiler: command, possibly with options.
        cpu_flags: the features of the CPU, which ``-march=native`` uses.

    Raises:
        OSError: the compiler cannot be started, or the library cannot be written or loaded.
        subprocess.CalledProcessError: the compilation failed.
    """
    folder = _folder()
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            binary = Path(temporary) / "esvit.so"
            compile_kernels(compiler, "native", binary)
            return ctypes.CDLL(str(binary))
    binary = folder / _name(compiler, cpu_flags)
    checksum = binary.with_suffix(".sha256")
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(binary, checksum):
            logger.info("CPU kernels: compiling %s", binary)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                made = Path(temporary) / binary.name
                compile_kernels(compiler, "native", made)
                checksum.write_text(_digest(made), encoding="ascii")
                made.replace(binary)
            _evict(folder)
        return ctypes.CDLL(str(binary))


def _folder() -> Path | None:
    """The folder of the libraries; None if none can be made that only this user can write."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(chosen) if chosen else cache / "esvit" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder_problem(folder.lstat()) is None and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):  # the disk is write-protected, or the user has no home
        pass
    try:
        return private_folder("kernels", FOLDER_VARIABLE)
    except UserError:
        return None


def _name(compiler: str, cpu_flags: Iterable[str]) -> str:
    """Name of a library: a hash of all that decides its content."""
    version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=False).stdout
    content = [
        compiler,
        version.decode(errors="replace"),
        *FLAGS,
        platform.machine(),
        *sorted(cpu_flags),
    ]
    return f"{Path(file_name('native')).stem}-{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}.so"


def _is_whole(binary: Path, checksum: Path) -> bool:
    try:
        return checksum.read_text(encoding="ascii") == _digest(binary)
    except (OSError, UnicodeDecodeError):
        return False


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _evict(folder: Path) -> None:
    """Remove all but the newest libraries."""
    for old in sorted(folder.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
        old.unlink(missing_ok=True)
        old.with_suffix(".sha256").unlink(missing_ok=True)

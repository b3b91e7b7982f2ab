"""Compile the C kernels ahead of time for machines without a compiler: one library per x86-64 level.

    python3 esvit_core/kernels/build.py [FOLDER]

The default folder is that of this file, where :func:`esvit_core.kernels.library` looks for them. The build of the
container images runs this file before anything is installed, so it imports only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# Vectorize loops; no -ffast-math, which changes the rounding of the whole process.
FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# Levels of the x86-64 psABI, highest first, with their features as named in /proc/cpuinfo.
V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
LEVELS = {
    "x86-64-v4": V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": V3,
}
SOURCES = Path(__file__).parent


def find_compiler() -> str | None:
    """Return the C compiler: ``CC``, or the first of cc, gcc and clang on the path."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compile_kernels(compiler: str, march: str, output: Path) -> None:
    """Compile the kernels into a shared library.

    Args:
        compiler: command, possibly with options.
        march: value of the compiler's ``-march``.
        output: path of the library.

    Raises:
        OSError: the compiler cannot be started.
        subprocess.CalledProcessError: the compilation failed; ``stderr`` holds the compiler's output.
    """
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [*shlex.split(compiler), f"-march={march}", *FLAGS, *sources, "-o", str(output), "-lm"]
    subprocess.run(command, check=True, capture_output=True)


def file_name(level: str) -> str:
    """Return the file name of a level's library; a hash of the sources prevents loading a library of other sources."""
    content = b"".join(path.read_bytes() for path in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))))
    return f"esvit-{level}-{hashlib.sha256(content).hexdigest()[:12]}.so"


def main(folder: Path) -> int:
    """Compile the library of every level; only x86-64 is supported."""
    if platform.machine() != "x86_64":
        print(f"{platform.machine()}: kernels can only be precompiled for x86-64")
        return 0
    compiler = find_compiler()
    if compiler is None:
        print("error: no C compiler; install gcc and libc6-dev, or set CC", file=sys.stderr)
        return 2
    for level in LEVELS:
        try:
            compile_kernels(compiler, level, folder / file_name(level))
        except (OSError, subprocess.CalledProcessError) as error:
            output = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
            print(f"error: {compiler} failed to compile the kernels for {level}: {output}", file=sys.stderr)
            return 2
        print(folder / file_name(level))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else SOURCES))

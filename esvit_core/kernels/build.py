"""Compile the C kernels ahead of time, for a machine without a compiler: one library for each level of x86-64.

    python3 esvit_core/kernels/build.py [FOLDER]

The default folder is this one, where :func:`esvit_core.kernels.library` looks for them. The images' build calls this
file before anything is installed, so it imports nothing but the standard library.
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

# Loops over a row as wide as the processor allows; no -ffast-math, which changes how the whole process rounds.
FLAGS = ("-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# The x86-64 psABI's levels, the widest first, and what /proc/cpuinfo calls the features that each adds.
V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
LEVELS = {
    "x86-64-v4": V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": V3,
}
SOURCES = Path(__file__).parent


def find_compiler() -> str | None:
    """The C compiler: ``CC``, or the first of cc, gcc and clang on the path."""
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def compile_kernels(compiler: str, march: str, output: Path) -> None:
    """Compile the kernels into a shared library.

    Args:
        compiler: a command, with its own options perhaps.
        march: the processor, as the compiler's ``-march`` names it.
        output: the library.

    Raises:
        OSError: the compiler cannot be started.
        subprocess.CalledProcessError: it refused; ``stderr`` has its output.
    """
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    command = [*shlex.split(compiler), f"-march={march}", *FLAGS, *sources, "-o", str(output), "-lm"]
    subprocess.run(command, check=True, capture_output=True)


def file_name(level: str) -> str:
    """Name of the library for a level: it has the hash of the sources, so that one of other sources is not loaded."""
    content = b"".join(path.read_bytes() for path in sorted((*SOURCES.glob("*.c"), *SOURCES.glob("*.h"))))
    return f"esvit-{level}-{hashlib.sha256(content).hexdigest()[:12]}.so"


def main(folder: Path) -> int:
    """Compile the library of every level, on x86-64; other machines have none yet."""
    if platform.machine() != "x86_64":
        print(f"{platform.machine()}: no kernels are compiled ahead of time for it")
        return 0
    compiler = find_compiler()
    if compiler is None:
        print("error: no C compiler: install gcc and libc6-dev, or name one in CC", file=sys.stderr)
        return 2
    for level in LEVELS:
        try:
            compile_kernels(compiler, level, folder / file_name(level))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip()
            print(f"error: {compiler} does not compile the kernels for {level}: {said}", file=sys.stderr)
            return 2
        print(folder / file_name(level))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else SOURCES))

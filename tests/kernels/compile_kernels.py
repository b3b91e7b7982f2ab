"""Compile Triton kernels for GPUs that need not be here: ``python compile_kernels.py < kernels.json``.

Input: a list of ``[module, kernel, signature, constants, options]``. Output: for each kernel and architecture, the registers of
a thread and the bytes that it spills, as ``ptxas`` reports them.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)


def compile_kernel(
    module: str, name: str, signature: dict[str, str], constants: dict[str, object], options: dict[str, int]
) -> dict[str, list[int]]:
    """Return ``{architecture: [registers, spilled bytes]}``."""
    kernel = getattr(importlib.import_module(module), name)
    found = {}
    for architecture in ARCHITECTURES:
        types = signature | dict.fromkeys(constants, "constexpr")
        ordered = {parameter: types[parameter] for parameter in kernel.arg_names}
        # Pointers of torch are multiples of 16 bytes.
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(ordered.values()) if kind.startswith("*")
        }
        source = ASTSource(kernel, ordered, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        found[str(architecture)] = report(compiled.asm["ptx"], architecture)
    return found


def report(ptx: str, architecture: int) -> list[int]:
    tool = knobs.nvidia.ptxas_blackwell if architecture >= 100 else knobs.nvidia.ptxas
    suffix = "a" if architecture >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"--gpu-name=sm_{architecture}{suffix}", file.name, "-o", "/dev/null"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", output)[1])
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", output))
    return [registers, spilled]


if __name__ == "__main__":
    print(json.dumps([compile_kernel(*kernel) for kernel in json.load(sys.stdin)]))

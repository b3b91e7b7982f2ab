"""Check that every program of a pod can start, and print the versions.

    docker run --rm esvit/trainer:0.1.0 python /usr/share/esvit/check.py

Exits with code 1 and prints a line for each failure. Needs no network and no object store, and writes to a
temporary folder only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

# kfp starts a step with its executor, and torchx a training with torchrun's module; the training module is ours.
MODULES = ("esvit_pipelines.cli.main", "esvit_core.training.__main__", "kfp.dsl.executor_main", "torch.distributed.run")
# Of the extras `formats` and `duplicates`: they come with libraries of their own.
READERS = ("imagecodecs", "imagehash", "pillow_heif", "pillow_jxl", "pyarrow", "pydicom", "rawpy", "tifffile")
PROGRAMS = ("esvit", "torchrun", "weed")
PACKAGES = ("esvit", "torch", "torchvision", "timm", "kfp", "torchx", "minio")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("cpu", "cuda"), help="expected build of PyTorch")
    variant = parser.parse_args().variant
    failed = [f"{name}: not on PATH" for name in PROGRAMS if shutil.which(name) is None]
    for name in (*MODULES, *READERS, *components()):
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    import torch

    if variant == "cuda" and torch.version.cuda is None:
        failed.append("torch: this build is for the CPU only, but the image is for GPUs; build without TORCH_INDEX_URL")
    names = [d.metadata["Name"] for d in metadata.distributions()]
    if variant == "cpu" and any(name.startswith("nvidia-") for name in names):
        failed.append("torch: NVIDIA's libraries are in the CPU image")
    if variant == "cuda" and (problem := compiler_problem()):
        failed.append(f"triton: {problem}")
    failed += [f"torch: {error}" for error in compute()]
    failed += [f"{level}: the kernels are not compiled" for level in missing_kernels()]
    versions = {name: metadata.version(name) for name in PACKAGES}
    print(json.dumps(versions | {"cuda": torch.version.cuda, "kernels": chosen_kernels()}, indent=1))
    print("\n".join(f"error: {line}" for line in failed), file=sys.stderr, end="")
    return 1 if failed else 0


def compute() -> list[str]:
    """Errors of PyTorch on the CPU: matrix products, their gradients, LAPACK, and torchvision's resize."""
    import torch
    from torchvision.transforms.v2 import functional

    try:
        x = torch.randn(4, 4, requires_grad=True)
        (x @ x).sum().backward()
        torch.linalg.svd(x.detach())
        functional.resize(torch.zeros(3, 8, 8, dtype=torch.uint8), [4, 4])
        torch.cuda.is_available()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return []


def compiler_problem() -> str:
    """Why Triton could not compile an extension module of Python as it does at its first kernel; "" if it could."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "extension.c")
        source.write_text("#include <Python.h>\n")
        include = f"-I{sysconfig.get_path('include')}"
        command = [compiler, "-shared", "-fPIC", include, str(source), "-o", str(source.with_suffix(".so"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in result.stderr.splitlines() if "error" in line] or [f"exit code {result.returncode}"]
    return f"{compiler} cannot compile with Python's headers: {lines[0]}" if result.returncode else ""


def missing_kernels() -> list[str]:
    """Levels of x86-64 for which the image has no compiled kernels."""
    from esvit_core.kernels import build

    levels = build.LEVELS if platform.machine() == "x86_64" else ()
    return [level for level in levels if not (build.SOURCES / build.file_name(level)).exists()]


def chosen_kernels() -> str | None:
    """File of the kernels for this processor; None: torch computes."""
    from esvit_core.kernels import library

    found = library()
    return Path(found._name).name if found else None


def components() -> list[str]:
    """The modules of all steps."""
    import esvit_components

    found = pkgutil.walk_packages(esvit_components.__path__, "esvit_components.")
    return [module.name for module in found if module.name.endswith(".component")]


if __name__ == "__main__":
    sys.exit(main())

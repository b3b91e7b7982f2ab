"""Check that everything that a pod starts can start, and print the versions: the health of the image's entry points.

    docker run --rm esvit/trainer:0.1.0 python /usr/share/esvit/check.py

Exit code 1 and a line for each thing that cannot. Needs no network, no object store, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import shutil
import sys
from importlib import metadata

# kfp starts a step with its executor, torchx a training with torchrun's module, and the training is ours.
MODULES = ("esvit_pipelines.cli", "esvit_core.training.__main__", "kfp.dsl.executor_main", "torch.distributed.run")
PROGRAMS = ("esvit", "torchrun", "weed")
PACKAGES = ("esvit", "torch", "torchvision", "timm", "kfp", "torchx", "minio")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=("cpu", "cuda"), help="the build of PyTorch that is expected")
    wanted = parser.parse_args().variant
    failed = [f"{name}: not on PATH" for name in PROGRAMS if shutil.which(name) is None]
    for name in (*MODULES, *components()):
        try:
            importlib.import_module(name)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    import torch

    if wanted == "cuda" and torch.version.cuda is None:
        failed.append("torch: a build for the CPU only, in an image for GPUs; leave TORCH_INDEX_URL out")
    if wanted == "cpu" and torch.version.cuda is not None:
        print("note: this PyTorch comes with CUDA (gigabytes); name PyTorch's index for the CPU in TORCH_INDEX_URL")
    print(json.dumps({name: metadata.version(name) for name in PACKAGES} | {"cuda": torch.version.cuda}, indent=1))
    print("\n".join(f"error: {line}" for line in failed), file=sys.stderr, end="")
    return 1 if failed else 0


def components() -> list[str]:
    """The modules of all steps."""
    import esvit_components

    found = pkgutil.walk_packages(esvit_components.__path__, "esvit_components.")
    return [module.name for module in found if module.name.endswith(".component")]


if __name__ == "__main__":
    sys.exit(main())

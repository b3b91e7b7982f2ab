"""Make a PyTorch that was built with CUDA independent of NVIDIA's libraries, for the CPU image.

    python3 without_cuda.py /opt/esvit/lib/python3.11/site-packages

PyTorch's own index has builds for the CPU; the ordinary index has none for x86-64. The build with CUDA is linked with
3.4 GB of NVIDIA's libraries, and `import torch` fails without them, although a CPU never needs a result from them. This
script writes a stub for each of these libraries beside PyTorch's own. A stub defines the functions that PyTorch refers to,
and each returns an error, so that `torch.cuda.is_available()` is False on every machine. PyTorch's own files are not
changed. NVIDIA's packages can be uninstalled afterwards.

Needs nm, readelf, and cc (set CC to use another compiler).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

CC = os.environ.get("CC", "cc")


def main(site: Path) -> None:
    folder = site / "torch/lib"
    nvidia = {path.name: path for path in site.glob("nvidia/*/lib/*.so*")}
    linked: set[str] = set()
    wanted: dict[str, set[str]] = defaultdict(set)  # symbol: its required versions
    for library in (*folder.glob("*.so*"), *site.glob("torchvision/*.so")):
        linked |= set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "--dynamic", library))) & set(nvidia)
        for symbol, version in symbols(library, "--undefined-only"):
            wanted[symbol].add(version)
    for name in sorted(linked):
        # Some libraries contain copies of C++ functions; NVIDIA's interfaces are in C.
        defined = [symbol for symbol, _ in symbols(nvidia[name], "--defined-only") if not symbol.startswith("_Z")]
        found = {symbol: wanted[symbol] for symbol in defined if symbol in wanted}
        write_stub(folder / name, found)
        print(f"{name}: a stub of {len(found)} functions")


def symbols(library: Path, which: str) -> list[tuple[str, str]]:
    """Names and versions of a library's dynamic symbols."""
    names = (line.split()[-1].partition("@") for line in run("nm", "--dynamic", which, library).splitlines())
    return [(name, version.lstrip("@")) for name, _, version in names]


def write_stub(path: Path, functions: dict[str, set[str]]) -> None:
    """Compile a library of functions that return an error: 100, which is CUDA's cudaErrorNoDevice."""
    code, versions = [], defaultdict(list)
    for name in sorted(functions):
        is_text = name.endswith(("ErrorString", "ErrorName"))
        code.append(
            f"const char *{name}(void) {{ return {chr(34) + 'no CUDA in this image' + chr(34) if is_text else '(void *)100'}; }}"
        )
        for version in functions[name] - {""}:
            versions[version].append(name)
    script = path.with_suffix(".map")
    script.write_text("".join(f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items()))
    options = [f"-Wl,-soname,{path.name}", *([f"-Wl,--version-script={script}"] if versions else [])]
    command = [CC, "-shared", "-fPIC", "-O1", "-w", "-fno-builtin", *options, "-x", "c", "-", "-o", path]
    subprocess.run(command, input="\n".join(code) + "\n", text=True, check=True)
    script.unlink()


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))

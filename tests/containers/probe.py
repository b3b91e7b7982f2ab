"""Inspect the image from inside, without privileges or a network, and print the result as JSON."""

import json
import os
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

BUILD_PROGRAMS = ("cc", "c++", "gcc", "g++", "clang", "ld", "as", "make", "cmake", "cargo", "nvcc", "pip", "pip3", "git", "curl", "wget")  # fmt: skip
CACHES = ("/var/cache/apt", "/var/lib/apt/lists", "/work", "/tmp", "/opt/tools", "/wheels")
TORCH, BROUGHT = ("torch", "torchvision"), ("triton", "nvidia-", "cuda-")


def writable(folder: str) -> bool:
    try:
        (Path(folder) / "probe").write_text("")
    except OSError:
        return False
    return True


def setuid_programs() -> list[str]:
    folders = ("/usr", "/opt", "/etc", "/var", "/work")
    found = (Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names)
    return [str(p) for p in found if p.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID) and not p.is_symlink()]


def leftovers() -> list[str]:
    found = [str(p) for folder in CACHES for p in Path(folder).rglob("*") if p.is_file()]
    return found + [str(p) for p in Path("/opt").rglob("*.whl")]


def size(prefixes: tuple[str, ...]) -> int:
    """Size of the files of the distributions with these name prefixes, including their .pyc files, bytes."""
    chosen = [d for d in distributions if d.metadata["Name"].lower().startswith(prefixes)]
    files = (Path(str(d.locate_file(file))) for d in chosen for file in d.files or ())
    return sum(path.lstat().st_size for path in files if path.is_file())


distributions = list(metadata.distributions())
left = leftovers()  # before anything here writes
checked = subprocess.run([sys.executable, "/usr/share/esvit/check.py"], capture_output=True, text=True)
sbom = Path("/usr/share/esvit/sbom")
origin = metadata.distribution("esvit").read_text("direct_url.json")
print(
    json.dumps(
        {
            "user": [os.getuid(), os.getgid()],
            "python": [sys.prefix, *sys.version_info[:2]],
            "writable": [f for f in ("/", "/etc", "/opt/esvit", "/usr", "/tmp", "/work", "/var/tmp") if writable(f)],
            "programs": [p for p in BUILD_PROGRAMS if shutil.which(p)],
            "modules": [m for m in ("pip", "ensurepip", "pytest") if find_spec(m)],
            "setuid": setuid_programs(),
            "left": left,
            "check": [checked.returncode, checked.stdout, checked.stderr],
            "packages": {d.metadata["Name"]: d.version for d in distributions},
            "torch_bytes": size(TORCH),
            "brought_bytes": size(BROUGHT),
            "sbom": json.loads((sbom / "python.cdx.json").read_text()),
            "debian": (sbom / "debian.tsv").read_text(),
            "origin": json.loads(origin or "{}"),
        }
    )
)

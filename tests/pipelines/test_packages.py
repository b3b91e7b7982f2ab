"""The wheel contains all packages, under specific names."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


def test_the_list_of_packages_is_complete() -> None:
    found = set()
    for package, folder in SETTINGS["package-dir"].items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).parent.parts
            if "tests" not in parts:
                found.add(".".join((package, *parts)))
    found.add("esvit_core.config.presets")  # files only
    assert sorted(SETTINGS["packages"]) == sorted(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    # setuptools builds in the working directory, so build in a copy.
    copy = folder / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "esvit_core", "components", "pipelines"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    out = folder / "out"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", build, str(out)],
        cwd=copy,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built)


def test_a_wheel_claims_no_generic_name(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(SETTINGS["package-dir"])


def test_a_wheel_has_every_module_and_the_files_beside_them(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for package, folder in SETTINGS["package-dir"].items():
        for file in (ROOT / folder).rglob("*"):
            inside = file.relative_to(ROOT / folder)
            if "tests" in inside.parts or file.suffix not in {".py", ".yaml", ".md", ".html", ".css", ".typed"}:
                continue
            assert f"{package}/{inside.as_posix()}" in names
    assert not [name for name in names if "/tests/" in name]


def test_a_wheel_has_the_command(wheel: zipfile.ZipFile) -> None:
    scripts = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert b"esvit = esvit_pipelines.cli.main:main" in wheel.read(scripts[0])

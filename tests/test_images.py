"""The build context and the scripts of the images. tests/containers tests the content of the images, with Docker."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths

ROOT = Path(__file__).parent.parent


def test_the_build_context_has_the_sources_and_no_wheels(tmp_path: Path) -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in (
        "constraints.txt",
        "esvit_core/config/__init__.py",
        "esvit_core/kernels/fused_softmax.c",
        "esvit_core/kernels/esvit-x86-64-v4-0.so",
        "components/tests/test_x.py",
        "images/build",
        "images/trainer/Dockerfile",
        "images/wheels/torch-2-cp311-manylinux_x86_64.whl",
        ".venv/bin/python",
        "esvit-runs/store/volume.dat",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    sent = {name for name in exclude_paths(str(tmp_path), patterns) if (tmp_path / name).is_file()}
    assert sent == {
        "constraints.txt",
        "esvit_core/config/__init__.py",
        "esvit_core/kernels/fused_softmax.c",
        "images/build",
        "images/trainer/Dockerfile",
    }


def test_the_wheels_are_served_on_the_loopback_interface(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.0+cpu-py3-none-any.whl").write_bytes(b"PK")
    port = tmp_path / "port"
    server = subprocess.Popen([sys.executable, ROOT / "images/serve.py", tmp_path / "wheels", port])
    try:
        while not port.exists() or not port.read_text():
            assert server.poll() is None
        address = f"http://127.0.0.1:{port.read_text()}"
        listing = urllib.request.urlopen(f"{address}/").read().decode()
        assert "torch-2.0%2Bcpu-py3-none-any.whl" in listing
        assert urllib.request.urlopen(f"{address}/torch-2.0%2Bcpu-py3-none-any.whl").read() == b"PK"
    finally:
        server.kill()
        server.wait()


def test_the_image_for_gpus_has_what_triton_compiles_with() -> None:
    last_stage = (ROOT / "images/trainer/Dockerfile").read_text(encoding="utf-8").split("\nFROM ")[-1]
    installed = last_stage.index("gcc libc6-dev python3-dev")
    assert last_stage.index("ARG VARIANT") < last_stage.index('"$VARIANT" = cuda') < installed
    assert installed < last_stage.index("cyclonedx-py") < last_stage.index("check.py --variant")


def test_the_check_of_the_image_notices_a_compiler_without_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("check", ROOT / "images/trainer/check.py")
    assert spec and spec.loader
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.compiler_problem() == "there is no C compiler"
    (tmp_path / "gcc").write_text(
        "#!/bin/sh\necho 'extension.c:1:10: fatal error: Python.h: No such file' >&2; exit 1\n"
    )
    (tmp_path / "gcc").chmod(0o755)
    assert check.compiler_problem().endswith(
        "cannot compile with Python's headers: extension.c:1:10: fatal error: Python.h: No such file"
    )
    (tmp_path / "gcc").write_text("#!/bin/sh\nexit 0\n")
    assert check.compiler_problem() == ""


@pytest.mark.parametrize("command", ["images/build", "images/get-wheels", "images/debian", ".ci/containers"])
def test_the_scripts_are_valid(command: str) -> None:
    subprocess.run(["bash", "-n", ROOT / command], check=True)

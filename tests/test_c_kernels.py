"""The C kernels are optional: precompiled for a CPU level, else compiled on first use, else torch computes."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forked import Forked

from esvit_core import kernels
from esvit_core.kernels import build, compiled, fused_softmax, image_ops, window_attention

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="session")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernels of every level, built without torch as in the container image."""
    folder = tmp_path_factory.mktemp("kernels")
    subprocess.run([sys.executable, "-I", build.__file__, folder], check=True, capture_output=True)
    return folder


def test_no_module_beside_the_build_hides_one_of_python() -> None:
    """The image's build runs build.py as a script, so that Python looks for modules in its folder first."""
    beside = {path.stem for path in Path(build.__file__).parent.glob("*.py")}
    assert not beside & sys.stdlib_module_names


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert kernels.library.__wrapped__() is None


@pytest.mark.parametrize("ends", ["echo no such option >&2; exit 1", "exit 0"], ids=["refuses", "writes nothing"])
def test_a_compiler_that_fails_is_named_and_torch_computes(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{ends}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level(logging.INFO, kernels.__name__):
        assert kernels.library.__wrapped__() is None
    assert str(compiler) in caplog.text and "torch computes" in caplog.text


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes a line to this file for each compilation and is fast, and an empty folder of libraries."""
    calls, compiler = tmp_path / "calls", tmp_path / "cc"
    calls.touch()
    compiler.write_text(f'#!/bin/sh\ncase "$1" in --version) ;; *) echo "$@" >> {calls};; esac\nexec cc "$@" -O0\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv(compiled.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    return calls


@needs_compiler
def test_kernels_are_compiled_once_and_again_when_damaged(counted: Path, tmp_path: Path) -> None:
    flags = ["avx2"]
    first = compiled.compiled_library(str(counted.with_name("cc")), flags)
    again = compiled.compiled_library(str(counted.with_name("cc")), flags)
    assert first._name == again._name and len(counted.read_text().splitlines()) == 1
    folder = Path(first._name).parent
    assert folder == tmp_path / "kernels" and folder.stat().st_mode & 0o777 == 0o700
    content = Path(first._name).read_bytes()
    for damaged in (content[:-1], content[:4000] + bytes([content[4000] ^ 1]) + content[4001:]):
        (folder / "damaged").write_bytes(damaged)  # replaced as a whole: this process has the other one mapped
        (folder / "damaged").replace(first._name)
        compiled.compiled_library(str(counted.with_name("cc")), flags)
        assert compiled._is_whole(Path(first._name), Path(first._name).with_suffix(".sha256"))
    assert len(counted.read_text().splitlines()) == 3
    other = compiled.compiled_library(str(counted.with_name("cc")), [*flags, "fma"])
    assert other._name != first._name, "another CPU has a library of its own"


@needs_compiler
def test_concurrent_processes_compile_once(counted: Path) -> None:
    script = "from esvit_core import kernels; assert kernels._compile() is not None"
    processes = [Forked(script) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert len(counted.read_text().splitlines()) == 1


@needs_compiler
def test_a_folder_that_others_can_write_is_not_used(
    counted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    library = compiled.compiled_library(str(counted.with_name("cc")), [])
    assert Path(library._name).parent == tmp_path / f"esvit-kernels-{os.geteuid()}"
    (tmp_path / f"esvit-kernels-{os.geteuid()}").chmod(0o777)
    library = compiled.compiled_library(str(counted.with_name("cc")), [])
    assert not Path(library._name).exists(), "it was compiled into a folder of its own, which is removed"
    assert not list((tmp_path / "kernels").iterdir())


@needs_compiler
def test_only_the_newest_libraries_are_kept(counted: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir(mode=0o700)
    for number in range(12):
        for suffix in (".so", ".sha256"):
            (tmp_path / "kernels" / f"old-{number}{suffix}").write_text("x")
        os.utime(tmp_path / "kernels" / f"old-{number}.so", (number, number))
    library = compiled.compiled_library(str(counted.with_name("cc")), [])
    kept = {path.name for path in (tmp_path / "kernels").glob("*.so")}
    assert kept == {Path(library._name).name, *(f"old-{number}.so" for number in range(5, 12))}
    assert len(list((tmp_path / "kernels").glob("*.sha256"))) == len(kept)


@needs_compiler
@pytest.mark.parametrize(
    ("lacking", "chosen"),
    [(set(), "x86-64-v4"), ({"avx512vl"}, "x86-64-v3"), ({"fma"}, None)],
    ids=["v4", "v3", "older"],
)
def test_cpu_features_select_the_library(
    lacking: set[str], chosen: str | None, prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading does not use the features, so this runs on any x86-64."""
    cpuinfo = tmp_path / "cpuinfo"
    flags = " ".join(build.LEVELS["x86-64-v4"] - lacking | {"sse2"})
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nvmx flags\t: avx512vl\n")
    found = kernels._load_prebuilt(prebuilt, kernels._cpu_flags(cpuinfo))
    assert (found and Path(found._name)) == (chosen and prebuilt / build.file_name(chosen))


@needs_compiler
def test_a_library_of_other_sources_is_not_loaded(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES, sources)
    (sources / "fused_softmax.c").write_text((sources / "fused_softmax.c").read_text() + "/* changed */\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    assert kernels._load_prebuilt(prebuilt, build.LEVELS["x86-64-v4"]) is None


@needs_compiler
def test_without_a_compiler_the_precompiled_library_is_used(prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(kernels, "SOURCES", prebuilt)
    monkeypatch.setattr(kernels, "_cpu_flags", lambda: build.LEVELS["x86-64-v3"])
    found = kernels.library.__wrapped__()
    assert found is not None and found.teacher_softmax.argtypes and Path(found._name).parent == prebuilt


def test_a_build_without_a_compiler_names_the_packages_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert build.main(tmp_path) == 2
    assert "install gcc" in capsys.readouterr().err


@needs_compiler
@pytest.mark.parametrize("level", build.LEVELS)
def test_the_kernels_of_a_level_compute_the_formulas(
    level: str, prebuilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not build.LEVELS[level] <= kernels._cpu_flags():
        pytest.skip(f"this CPU lacks the features of {level}")
    monkeypatch.setattr(kernels, "SOURCES", prebuilt)
    monkeypatch.setattr(kernels, "_cpu_flags", lambda: build.LEVELS[level])
    library = kernels.library.__wrapped__()
    assert isinstance(library, ctypes.CDLL)
    monkeypatch.setattr(kernels, "library", lambda: library)
    monkeypatch.setattr(image_ops, "library", lambda: library)
    torch.manual_seed(0)

    z, center, out = torch.randn(8, 1000), torch.randn(1, 1000), torch.empty(8, 1000)
    expected = ((z - center).double() / 0.04).softmax(-1)
    fused_softmax.C_KERNELS.teacher_softmax(z, torch.arange(8), center, 0.04, out)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)

    for width in window_attention.HEAD_WIDTHS:
        heads, index = 2, torch.arange(3 * 49).view(3, 49)
        qkv = torch.randn(2, 3 * 49, 3 * heads * width, requires_grad=True)
        out = window_attention.attend_in_windows(qkv, heads, None, index, None, None, 0.2)
        exact = qkv.detach().double().requires_grad_()
        q, k, v = exact[:, index].unflatten(-1, (3, heads, width)).permute(3, 0, 1, 4, 2, 5)
        expected = ((0.2 * q @ k.mT).softmax(-1) @ v).transpose(2, 3).flatten(3).flatten(1, 2)
        outer = torch.randn_like(out)
        out.backward(outer)
        expected.backward(outer.double())
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
        torch.testing.assert_close(qkv.grad.double(), exact.grad, rtol=0, atol=1e-4)

    image, out = torch.randint(0, 256, (70, 90, 3), dtype=torch.uint8), torch.empty(3, 33, 33)
    crop = image_ops.describe_crop((5, 3, 85, 64), False, (), False, None, False, out)
    image_ops.make_crops(image.numpy(), [crop], torch.ones(3), torch.zeros(3))
    pixels = image.permute(2, 0, 1)[None, :, 3:64, 5:85]
    assert torch.equal(out, F.interpolate(pixels, (33, 33), mode="bicubic", antialias=True)[0].float())

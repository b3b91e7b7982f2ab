"""The compiled functions are optional: without a compiler, or with one that fails, torch computes."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from esvit_core import compiled


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compiled.library.__wrapped__() is None


@pytest.mark.parametrize("ends", ["echo no such option >&2; exit 1", "exit 0"], ids=["refuses", "writes nothing"])
def test_a_compiler_that_fails_is_named_and_torch_computes(
    ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{ends}\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(compiler))
    with caplog.at_level(logging.INFO, compiled.__name__):
        assert compiled.library.__wrapped__() is None
    assert str(compiler) in caplog.text and "torch computes" in caplog.text

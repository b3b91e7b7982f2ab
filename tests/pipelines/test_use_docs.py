"""The commands and snippets of docs/use.md work, in their order, on the backbone of a finished run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esvit_core.runs.run import Run
from esvit_pipelines.cli.main import app

DOCS = Path(__file__).parent.parent.parent / "docs" / "use.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> Iterator[tuple[str, str]]:
    for found in BLOCK.finditer(DOCS.read_text(encoding="utf-8")):
        yield found[1], found[2]


def test_what_the_page_says_works(
    run_there: Run, finished_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_there.store.ensure_bucket("docs")  # a separate bucket, because other tests promote in the run's
    run_there.store.swap_pointer("s3://docs/pointers/champion", {"backbone": run_there.at("backbone")}, None)
    monkeypatch.setenv("ESVIT_BUCKET", "docs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(finished_run.folder / "images")
    first = min((tmp_path / "images" / "bars").iterdir())
    (tmp_path / "a.png").write_bytes(first.read_bytes())
    made: list[dict[str, Any]] = []
    for language, text in blocks():
        if language == "bash":
            for line in text.splitlines():
                app(shlex.split(line)[1:], standalone_mode=False)
        else:
            made.append({})
            exec(text, made[-1])
    assert [{"view", "regions", "mean"} & names.keys() for names in made] == [
        {"view", "regions"}, {"view", "regions"}, {"view", "regions"}, {"view", "regions"}, {"view", "regions"}, {"mean"}, set()
    ]  # fmt: skip
    timm, onnx, _, _, parquet, streamed, classifier = made
    row = parquet["table"]["name"].to_pylist().index(f"bars/{first.name}")
    # Pillow resizes in integers, hence the tolerance.
    np.testing.assert_allclose(onnx["view"][0], parquet["view"][row], atol=0.05)
    np.testing.assert_allclose(timm["view"][0].detach(), parquet["view"][row], atol=0.05)
    np.testing.assert_allclose(onnx["regions"][0], parquet["regions"][row], atol=0.2)
    assert parquet["nearest"][0] == 0 and parquet["best"][0] == 0
    np.testing.assert_allclose(streamed["mean"], parquet["view"].mean(0), atol=1e-5)
    assert sum(classifier["losses"][-2:]) < sum(classifier["losses"][:2]), "the classifier learns"
    assert len(classifier["right"]) == 12
    assert (tmp_path / "nearest.png").exists()

"""`esvit run --data DIR` with nothing else: it says what it chose, and the same command finds the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.data.ingest.sources import source_fingerprint
from esvit_core.runs.run import run_id
from esvit_core.storage.embedded import EmbeddedStore
from esvit_pipelines.settings import Settings, resolve_run

SHORT = [
    "training.epochs=1",
    "training.processes=1",
    "evaluation.linear.epochs=2",
    "evaluation.correspondence_images=4",
]
SHORT = [word for setting in SHORT for word in ("--set", setting)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    made = tmp_path_factory.mktemp("auto run")
    images.folder(made / "images", ["lines", "waves"], 30)
    return made


def test_a_run_without_a_recipe_explains_itself_and_is_found_again(
    folder: Path, esvit: Any, request: pytest.FixtureRequest
) -> None:
    explained = esvit("run", "--data", "images", *SHORT, "--explain", cwd=folder)
    assert explained.returncode == 0, explained.stderr
    assert not (folder / "esvit-runs").exists(), "nothing was started"
    server = EmbeddedStore(folder / "esvit-runs" / "store")
    server.start()  # for both commands
    request.addfinalizer(server.stop)
    first = esvit("run", "--data", "images", *SHORT, cwd=folder)
    assert first.returncode == 0, first.stdout + first.stderr
    assert explained.stdout in first.stdout
    (here,) = (folder / "esvit-runs").glob("auto-*")
    config = Config.load(here / "config.yaml")
    assert (config.recipe, config.training.epochs) == ("auto", 1)
    assert "verdict" in first.stdout and "esvit_core.load_backbone" in first.stdout
    report = (here / "report.html").read_text(encoding="utf-8")
    assert "chosen by the recipe auto" in report and "half of the images have a shorter side" in report
    again = esvit("run", "--data", "images", *SHORT, cwd=folder)
    assert f"run {here.name}, resumed: finished steps are reused" in again.stdout
    data = str(folder / "images")
    stored = resolve_run(Settings(data, str(here / "config.yaml"), (), (), folder, None)).config
    assert run_id(stored, source_fingerprint(data), {}) == here.name, (
        "with the stored recipe in place of auto, it is the same run"
    )

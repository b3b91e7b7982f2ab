"""The step that prepares the transfer sets: interrupted, and without sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esvit_components.data.prepare_transfer import prepare_transfer
from esvit_core.config import Config
from esvit_core.runs.run import CONFIG, Run


def test_a_repeated_step_prepares_only_the_missing_sets(
    store_env: Any, images: Any, tmp_path: Path, components: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [{"name": name, "source": str(tmp_path / name)} for name in ("first", "second")]
    config = Config.from_mapping({"bucket": store_env.bucket, "evaluation": {"transfer": sets}})
    run = Run(store_env.uri("runs/a"), store_env, config)
    store_env.put_bytes(run.at(CONFIG), config.to_yaml().encode())
    images.folder(tmp_path / "first", ["a", "b"], 6)
    with pytest.raises(SystemExit) as stop:
        components.directly(prepare_transfer, run_uri=run.uri)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: prepare transfer sets: {tmp_path / 'second'}: does not exist")
    before = [item.etag for item in store_env.list(run.at("transfer/first"))]
    images.folder(tmp_path / "second", ["a", "b"], 6)
    _, artifacts = components.directly(prepare_transfer, run_uri=run.uri)
    assert artifacts["sets"].metadata.keys() == {"uri", "first", "second"}
    assert before and [item.etag for item in store_env.list(run.at("transfer/first"))] == before


def test_a_run_without_transfer_sets_is_reported(
    store_env: Any, components: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(store_env.uri("runs/a"), store_env, Config())
    store_env.put_bytes(run.at(CONFIG), Config().to_yaml().encode())
    components.directly(prepare_transfer, run_uri=run.uri)
    assert capsys.readouterr().out == "nothing to do: the run has no transfer sets\n"

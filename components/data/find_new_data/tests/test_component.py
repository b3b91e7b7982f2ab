"""Find new data, called directly and run by kfp.local, on a real object store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from esvit_components.data.find_new_data import find_new_data
from esvit_core.config import Config
from esvit_core.registry.lease import Lease, lease_uri
from esvit_core.runs.run import Run


@pytest.fixture
def recipe(run_there: Run) -> Iterator[str]:
    """The recipe of retrainings whose last run is the finished one."""
    values = run_there.config.model_dump(mode="json", exclude_none=True)
    values["promotion"]["pointer"] = "component"
    config = Config.from_mapping(values)
    Lease(run_there.uri, "asked", "test", "2026-11-25T00:00:00+00:00", None).acquire(run_there.store, config, None)
    yield config.to_yaml()
    run_there.store.remove(lease_uri(config))


def test_the_images_of_the_last_run_are_not_new(run_there: Run, recipe: str, components: Any) -> None:
    outputs = components.through_kfp(find_new_data, source="images", recipe=recipe, owner="test")
    assert (outputs["run_uri"], outputs["nothing"]) == (run_there.uri, True)
    assert outputs["message"].startswith("nothing to do: images has 0 new files")
    assert outputs["found"]["metadata"]["images"] == 48


def test_a_missing_source_is_one_error_line(recipe: str, components: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        components.directly(find_new_data, source="nowhere", recipe=recipe, owner="test")
    assert stop.value.code == 2 and "find new data: nowhere: does not exist" in capsys.readouterr().err

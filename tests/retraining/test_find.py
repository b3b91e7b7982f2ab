"""A scan of the source starts a retraining, or finds nothing to do."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.data.ingest import prepare_part as module
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.retraining.find_new_data import find_new
from esvit_core.retraining.prepare_new_data import earlier_set, prepare_new
from esvit_core.runs.run import RETRAINING, open_run


def prepared(store: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, list[str]]:
    """Prepare the images of a run; return the manifest and the names of the files that were read."""
    read: list[str] = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda job, x: (read.append(x.entry.name), load(job, x))[1])
    manifest = prepare_new(open_run(run, store))
    monkeypatch.setattr(module, "load", load)
    return manifest, sorted(read)


def test_the_first_retraining_takes_all_images_and_starts_from_scratch(store, find, monkeypatch) -> None:
    found = find()
    assert (found.nothing, found.images, found.new) == (False, 12, 12)
    assert "in its first scan" in found.message and found.message.endswith("starts from scratch")
    manifest, read = prepared(store, found.run, monkeypatch)
    assert manifest.samples == len(read) == 12 and manifest.base is None


def test_without_new_images_there_is_nothing_to_do(store, find, decide, monkeypatch) -> None:
    first = find()
    prepared(store, first.run, monkeypatch)
    decide(first)
    keys = {stat.uri: stat.etag for stat in store.list(store.uri(""))}
    found = find("another")
    assert found.nothing and found.run == first.run
    assert found.message.startswith("nothing to do") and "has 0 new files since tiny-" in found.message
    assert {stat.uri: stat.etag for stat in store.list(store.uri(""))} == keys


def test_a_source_that_was_copied_to_another_place_has_nothing_new(
    store, find, decide, config, source, tmp_path, monkeypatch
) -> None:
    first = find()
    prepared(store, first.run, monkeypatch)
    decide(first)
    copy = shutil.copytree(source, tmp_path / "copy")
    for path in copy.rglob("*"):
        os.utime(path, (1_000, 1_000))
    found = find_new(config, str(copy), "me", store)
    assert found.nothing and (found.new, found.changed, found.gone) == (0, 0, 0)


def test_a_few_new_images_wait_until_there_are_enough(store, find, decide, grow, monkeypatch) -> None:
    first = decide(find())
    prepared(store, first.run, monkeypatch)
    grow(["a"], 8)
    found = find()
    assert found.nothing and found.new == 2 and "2 new files" in found.message
    assert "fewer than retrain.min_new_images=3" in found.message
    grow(["a", "b"], 8)
    found = find()
    assert not found.nothing and found.new == 4 and found.run != first.run
    manifest, read = prepared(store, found.run, monkeypatch)
    assert read == ["a/0-006.png", "a/0-007.png", "b/1-006.png", "b/1-007.png"]
    assert manifest.samples == 16 and manifest.base == f"{first.run}/data"


def test_what_was_not_promoted_is_not_taken_again(store, find, decide, grow, monkeypatch) -> None:
    for each in (6, 9, 12):
        grow(["a", "b"], each)
        found = decide(find())
        prepared(store, found.run, monkeypatch)
        assert found.new == {6: 12, 9: 6, 12: 6}[each]
    assert find().nothing


def test_with_other_data_settings_all_images_are_read_again(store, find, decide, config, grow) -> None:
    first = find()
    prepare_new(open_run(first.run, store))
    decide(first)
    grow(["a", "b"], 9)
    other = config.model_copy(update={"data": config.data.model_copy(update={"store_short_side": 32})})
    found = find(wanted=other)
    assert found.new == 6
    assert store.get_json(f"{found.run}/{RETRAINING}")["base"] is None
    assert prepare_new(open_run(found.run, store)).samples == 18


def test_a_source_without_most_of_its_earlier_images_is_an_error(store, find, decide, source) -> None:
    first = find()
    prepare_new(open_run(first.run, store))
    decide(first)
    for path in (*source.glob("a/*"), source / "b" / "1-000.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"7 of the 12 earlier images are gone.*max_removed_fraction=1"):
        find()
    assert find(max_removed_fraction=1.0).nothing


def test_a_source_without_images_is_an_error(find, source) -> None:
    shutil.rmtree(source)
    source.mkdir()
    with pytest.raises(UserError, match="no images"):
        find()


def test_the_first_retraining_knows_the_images_of_the_champion(store, find, crown, config, source, grow) -> None:
    run = crown(store.uri("runs/first"))
    prepare(str(source), store, f"{run}/data", config.data)
    found = find()
    assert found.nothing and found.run == run
    grow(["a", "b"], 9)
    found = find()
    assert found.new == 6 and f"starts from {run}/training/checkpoints/00000010" in found.message
    assert store.get_json(f"{found.run}/{RETRAINING}")["champion"] == run
    assert open_run(found.run, store).config.init.load == "heads"


def test_a_champion_on_other_images_provides_only_the_weights(store, find, crown, config, images, tmp_path) -> None:
    run = crown(store.uri("runs/first"))
    prepare(str(images.folder(tmp_path / "other", ["x", "y"], 6)), store, f"{run}/data", config.data)
    found = find()
    assert found.new == 12 and store.get_json(f"{found.run}/{RETRAINING}")["base"] is None
    assert open_run(found.run, store).config.init.source == f"{run}/training/checkpoints/00000010"


def test_a_transfer_set_that_was_prepared_before_is_reused(store, find, decide, config, source) -> None:
    sets = Config.from_mapping(
        config.model_dump(mode="json") | {"evaluation": {"transfer": [{"name": "set", "source": str(source)}]}}
    )
    first = find(wanted=sets)
    run = open_run(first.run, store)
    assert earlier_set(run, "set", config.data) is None
    prepare_new(run)
    prepare(str(source), store, run.at("transfer", "set"), config.data)
    decide(first)
    for path in source.glob("a/*"):
        path.write_bytes(path.read_bytes() + b"\0")
    second = open_run(find(wanted=sets).run, store)
    assert earlier_set(second, "set", config.data) == run.at("transfer", "set")
    assert earlier_set(second, "set", config.data.model_copy(update={"store_short_side": 16})) is None

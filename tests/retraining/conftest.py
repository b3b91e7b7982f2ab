"""A source of images, a configuration for retraining, and champions with the records that a retraining reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.retraining.find_new_data import NewData, find_new


@pytest.fixture
def config(store: Any) -> Config:
    return Config.from_mapping(
        {"bucket": store.bucket, "data": {"val_fraction": 0.3}, "retrain": {"min_new_images": 3}, "recipe": "tiny"}
    )


@pytest.fixture
def source(images: Any, tmp_path: Path) -> Path:
    """Two classes of six images each."""
    return images.folder(tmp_path / "images", ["a", "b"], 6)


@pytest.fixture
def grow(images: Any, source: Path, tmp_path: Path) -> Callable[..., None]:
    """Add images to the source without touching those in it: ``grow(classes, number of each)``."""

    def more(classes: list[str], each: int) -> None:
        drawn = images.folder(tmp_path / "drawn", classes, each)
        for path in drawn.rglob("*.png"):
            if not (there := source / path.relative_to(drawn)).exists():
                path.rename(there)

    return more


@pytest.fixture
def find(store: Any, config: Config, source: Path) -> Callable[..., NewData]:
    """Find new images: ``find(owner, **changes of the section retrain)``."""

    def look(owner: str = "me", wanted: Config = config, **retrain: Any) -> NewData:
        changed = wanted.model_copy(update={"retrain": wanted.retrain.model_copy(update=retrain)})
        return find_new(changed, str(source), owner, store)

    return look


@pytest.fixture
def decide(store: Any) -> Callable[[NewData], NewData]:
    """Record the decision on a retraining, which ends it."""

    def end(found: NewData) -> NewData:
        store.put_json(f"{found.run}/promotion.json", {"promoted": False})
        return found

    return end


@pytest.fixture
def crown(store: Any, config: Config) -> Callable[..., str]:
    """Make a run the champion: ``crown(run, model=..., checkpoint=True)``."""

    def make(run: str, model: dict[str, Any] | None = None, checkpoint: bool = True) -> str:
        described = {"model": model or config.model.model_dump(mode="json")}
        files = {"backbone.json": json.dumps(described).encode(), "model.safetensors": b"weights"}
        store.publish(f"{run}/backbone", files, "backbone")
        if checkpoint:
            store.publish(f"{run}/training/checkpoints/00000010", {"state": b"10"}, "checkpoint")
        pointer = store.uri("pointers/champion")
        store.swap_pointer(pointer, {"run": run, "backbone": f"{run}/backbone"}, store.read_pointer(pointer))
        return run

    return make

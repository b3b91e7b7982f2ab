"""Images generated for the tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from esvit_core.config import DataConfig
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest

# No deadline: the duration of an example depends on the other load of the machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


class Make:
    """Generates images, files and folders."""

    @staticmethod
    def pixels(seed: int = 0, width: int = 24, height: int = 20) -> np.ndarray:
        """Return smooth colours that depend on the seed, (height, width, 3) uint8."""
        rng = np.random.default_rng(seed)
        small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        return np.array(small.resize((width, height), Image.Resampling.BICUBIC))

    @staticmethod
    def file(image: np.ndarray | Image.Image | int, form: str = "PNG", **options: Any) -> bytes:
        """Encode an image; a number stands for the smooth colours of that seed."""
        if isinstance(image, int):
            image = Make.pixels(image)
        content = io.BytesIO()
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, form, **options)
        return content.getvalue()

    @staticmethod
    def folder(place: Path, files: Mapping[str, bytes]) -> Path:
        for name, data in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return place

    @staticmethod
    def labeled(classes: int = 3, each: int = 6) -> dict[str, bytes]:
        """Return names and contents of a labelled set, ``class<i>/<j>.png``."""
        return {f"class{i}/{j}.png": Make.file(100 * i + j) for i in range(classes) for j in range(each)}


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()


@pytest.fixture
def folder(tmp_path: Path, make: Make) -> Path:
    """Three classes of six images."""
    return make.folder(tmp_path / "images", make.labeled())


@pytest.fixture
def prepared(store) -> Callable[..., Manifest]:
    """Prepare a source at ``data`` of the test's bucket, with the settings given by name."""

    def run(source: Path | str, at: str = "data", **settings: Any) -> Manifest:
        return prepare(str(source), store, store.uri(at), DataConfig(**settings))

    return run

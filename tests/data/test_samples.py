"""The sample images: sufficient in number, small, and as their README describes."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_core.data.ingest.layout import detect_layout
from esvit_core.data.ingest.sources import open_source

SAMPLES = Path(__file__).parents[2] / "samples"
ARCHIVES = {"clipart.zip": 21, "clipart-other.zip": 8, "digits.zip": 10}


def contents(name: str) -> dict[str, bytes]:
    with open_source(str(SAMPLES / name)) as opened:
        return {entry.name: opened.read(entry) for entry in opened.entries}


def test_the_samples_are_small():
    assert sum(path.stat().st_size for path in SAMPLES.rglob("*") if path.is_file()) < 6 * 2**20


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_image_is_intact_and_has_a_class(name):
    files = contents(name)
    layout = detect_layout(list(files), name)
    assert len(layout.classes) == ARCHIVES[name] and all(
        place.label and not place.problem for place in layout.assignments
    )
    counts = Counter(place.label for place in layout.assignments)
    assert min(counts.values()) >= 37 and max(counts.values()) <= 200
    for data in files.values():
        image = Image.open(io.BytesIO(data))
        image.load()
        assert image.width == image.height and np.asarray(image.convert("L")).std() > 0
    assert len(set(files.values())) >= len(files) - 5  # of 8 x 8 digits two may be alike
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"`{re.escape(name)}` \| {len(files):,},", readme)
    if name != "digits.zip":
        assert all(re.search(rf"\b{label}\s+{count}\b", readme) for label, count in counts.items())


def test_there_are_enough_images_and_the_transfer_set_is_another_task():
    training, other = contents("clipart.zip"), contents("clipart-other.zip")
    assert len(training) >= 1000
    assert not set(training.values()) & set(other.values())
    assert not {name.split("/")[0] for name in training} & {name.split("/")[0] for name in other}

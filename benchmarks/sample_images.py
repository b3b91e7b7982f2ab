"""Measure how hard labelled images are without a network: 20-NN and logistic regression on raw pixels.

python benchmarks/sample_images.py samples/*.zip
"""

from __future__ import annotations

import io
import json
import sys

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from esvit_core.data.ingest.layout import detect_layout
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.ingest.split import hold_out

SIDE, HELD_OUT = 32, 0.2


def measure(source: str) -> dict[str, float | int | str]:
    """Measure the accuracy on the held-out images of one source, percent."""
    with open_source(source) as opened:
        places = detect_layout([entry.name for entry in opened.entries], source).assignments
        pixels = np.stack([read(opened.read(entry)) for entry in opened.entries])  # (N, SIDE * SIDE * 3)
    labels = [place.label for place in places]
    held = np.isin(np.arange(len(places)), list(hold_out([place.key for place in places], labels, HELD_OUT)))
    classes = np.array(labels)
    pixels -= pixels[~held].mean(0)
    direction = pixels / np.linalg.norm(pixels, axis=1, keepdims=True).clip(1e-6)
    neighbours = KNeighborsClassifier(20).fit(direction[~held], classes[~held])
    linear = max(
        LogisticRegression(C=c, max_iter=300).fit(pixels[~held], classes[~held]).score(pixels[held], classes[held])
        for c in (0.001, 0.01, 0.1)
    )
    largest = max(labels.count(label) for label in set(labels))
    return {
        "source": source,
        "images": len(labels),
        "held_out": int(held.sum()),
        "knn_20": round(100 * neighbours.score(direction[held], classes[held]), 1),
        "linear": round(100 * linear, 1),
        "chance": round(100 * largest / len(labels), 1),
    }


def read(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.float32).ravel() / 255


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(measure(argument)), flush=True)

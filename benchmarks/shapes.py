"""Measure what pre-training adds to regions: segmentation with a linear head, by the trained and by the initial weights.

    python benchmarks/shapes.py DIR [--seeds 0 1 2] [--set key=value ...]
    python benchmarks/shapes.py DIR --drawings samples/clipart.zip --backbone demo-run/<run>/backbone [--every 5]

The first command makes the images: disks, squares, triangles, crosses and rings of random color, size and place on a
gradient of colors with noise, so that color says nothing about the class. Those for pre-training show one to three shapes of
one class; those with masks show two or three of several classes. ``esvit run`` with
``benchmarks/shapes.yaml`` pre-trains on the former, and fits a linear head to the frozen regions of the latter.

The second command evaluates an existing backbone on drawings on white ground, of which each pixel that is not white has the
class of the drawing.

The last line is JSON: mIoU and region retrieval of both backbones, and the interval of their difference.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.ingest.layout import detect_layout
from esvit_core.data.ingest.sources import open_source
from esvit_core.evaluation.masked_images import read_masked_images
from esvit_core.evaluation.results import read_result
from esvit_core.evaluation.segmentation import measure_segmentation
from esvit_core.models.factory import create_backbone
from esvit_core.runs.run import identify_run, run_uri
from esvit_core.storage.session import open_store
from esvit_core.weights.backbone import load_backbone

RECIPE = Path(__file__).with_suffix(".yaml")
SIDE, WHITE = 64, 245
# Of each class, whether a point (y, x), relative to the center in units of the size, lies in the shape.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disk": lambda y, x: y**2 + x**2 < 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) < 0.85,
    "triangle": lambda y, x: (y < 0.75) & (y > 2.2 * abs(x) - 1),
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) < 0.33) & (np.maximum(abs(y), abs(x)) < 1),
    "ring": lambda y, x: (y**2 + x**2 < 1) & (y**2 + x**2 > 0.36),
}


def draw(rng: np.random.Generator, classes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one shape of each class.

    Args:
        classes: positions in :data:`SHAPES`.

    Returns:
        Pixels (SIDE, SIDE, 3) and mask (SIDE, SIDE), uint8; 0 is the ground, class c is c + 1, later shapes cover earlier ones.
    """
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    slope = (y / SIDE)[..., None] * rng.uniform(-60, 60, 3) + (x / SIDE)[..., None] * rng.uniform(-60, 60, 3)
    pixels = rng.uniform(60, 195, 3) + slope
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for value in classes:
        size, angle = rng.uniform(9, 15), rng.uniform(-0.5, 0.5)
        top, left = rng.uniform(size, SIDE - size, 2)
        a, b = (
            np.cos(angle) * (y - top) - np.sin(angle) * (x - left),
            np.sin(angle) * (y - top) + np.cos(angle) * (x - left),
        )
        inside = list(SHAPES.values())[value](a / size, b / size)
        pixels[inside] = rng.uniform(0, 255, 3)
        mask[inside] = value + 1
    return (pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8), mask


def make_images(folder: Path, count: int) -> Path:
    """Write images of one class each, ``<class>/<number>.png``."""
    for number in range(count):
        rng = np.random.default_rng([0, number])
        value = number % len(SHAPES)
        place = folder / list(SHAPES)[value]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(rng, [value] * int(rng.integers(1, 4)))[0]).save(place / f"{number:05d}.png")
    return folder


def make_masked(folder: Path, train: int, test: int) -> Path:
    """Write images of several classes and their masks, ``images/<split>/<number>.png`` and ``masks/``."""
    for number in range(train + test):
        rng = np.random.default_rng([1, number])
        split = "train" if number < train else "val"
        parts = draw(rng, rng.integers(0, len(SHAPES), rng.integers(2, 4)).tolist())
        for kind, pixels in zip(("images", "masks"), parts, strict=True):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / split / f"{number:05d}.png")
    return folder


def measure(folder: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    """Pre-train and evaluate one seed in a process of its own; return its figures."""
    overrides = [f"seed={seed}", f"evaluation.segmentation={folder / 'masked'}", *changes]
    command = [
        sys.executable,
        "-m",
        "esvit_pipelines",
        "run",
        "--recipe",
        str(RECIPE),
        "--data",
        str(folder / "images"),
    ]
    command += ["--out", str(folder / "runs"), *(word for each in overrides for word in ("--set", each))]
    subprocess.run(command, check=True)
    config = Config.load(RECIPE, overrides)
    with open_store(folder / "runs" / "store") as store:
        uri = run_uri(config.bucket, identify_run(config, str(folder / "images")))
        results = {name: read_result(store, uri, name) for name in ("segmentation", "knn")}
    return {"seed": seed} | {name: _figures(result) for name, result in results.items() if result is not None}


def make_drawings(folder: Path, source: str, every: int = 1) -> Path:
    """Write every nth drawing of a source and its mask: 0 for white, and class c + 1 for all other pixels."""
    with open_source(source) as opened:
        places = detect_layout([entry.name for entry in opened.entries], source).assignments
        classes = sorted({place.label or "" for place in places})
        for number, (entry, place) in enumerate(zip(opened.entries, places, strict=True)):
            if (number + 1) % every:
                continue
            image = Image.open(io.BytesIO(opened.read(entry))).convert("RGB")
            inside = (np.asarray(image) < WHITE).any(2)
            mask = (inside * (1 + classes.index(place.label or ""))).astype(np.uint8)
            for kind, pixels in (("images", image), ("masks", Image.fromarray(mask))):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                pixels.save(folder / kind / f"{number:05d}.png")
    return folder


def measure_backbone(folder: Path, backbone: str, seed: int) -> dict[str, Any]:
    """Measure a backbone and the same network with weights drawn from the seed on images with masks."""
    trained = load_backbone(backbone)
    found: dict[str, Any] = trained.backbone_config
    side = found["eval_crop"]
    config = Config.from_mapping(
        {
            "model": found["model"],
            "augment": {"global_crops": {"size": found["img_size"]}, "mean": found["mean"], "std": found["std"]},
            "evaluation": {"resize": side, "crop": side, "batch_size": 64},
        }
    )
    torch.manual_seed(seed)
    initial = create_backbone(config.model, found["img_size"], drop_path=0.0).eval()
    parts = read_masked_images(str(folder), None, side)
    return _figures(measure_segmentation(*parts, {"trained": trained, "baseline": initial}, config)[0])


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("points", "interval", "p", "images", "decision")
    return {
        key: {model: result["results"][model][key] for model in ("trained", "baseline")}
        | {name: difference[name] for name in kept}
        for key, difference in result["differences"].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the images and runs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=3000, help="images for pre-training")
    parser.add_argument("--masked", nargs=2, type=int, default=[200, 400], metavar=("TRAIN", "TEST"))
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--drawings", help="source of drawings on white ground, one folder per class")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth drawing")
    parser.add_argument("--backbone", help="backbone to evaluate on them")
    arguments = parser.parse_args()
    print(describe(torch.device("cpu")), flush=True)
    folder = arguments.folder.resolve()
    if arguments.drawings:
        if not (folder / "drawings").exists():
            make_drawings(folder / "drawings", arguments.drawings, arguments.every)
        print(json.dumps(measure_backbone(folder / "drawings", arguments.backbone, arguments.seeds[0])))
        return
    if not (folder / "masked").exists():
        make_images(folder / "images", arguments.images)
        make_masked(folder / "masked", *arguments.masked)
    print(json.dumps([measure(folder, seed, arguments.changes) for seed in arguments.seeds]))


if __name__ == "__main__":
    main()

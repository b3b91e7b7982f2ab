"""A run that has been prepared and trained, as the measured steps find it, on images made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_core.config import Config
from esvit_core.storage import ObjectStore

CONFIG = Config.from_mapping(
    {
        "augment": {"global_crops": {"size": 32, "number": 2, "scale": [0.4, 1.0]}},
        "model": {
            "arch": "swin",
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "evaluation": {
            "resize": 36,
            "crop": 32,
            "batch_size": 7,
            "knn_k": [1, 20, 200],
            "linear": {"epochs": 5, "lr": 0.1, "last_blocks": 2},
            "transfer": [
                {"name": "stripes", "source": "unused", "metric": "mean_per_class"},
                {"name": "plain", "source": "unused"},
            ],
            "visualization": 2,
            "correspondence_images": 5,
        },
    }
)


def draw(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Images of ``counts`` classes that differ in the colour and width of their stripes, 40 x 48."""
    rng = np.random.default_rng(seed)
    x = np.mgrid[0:40, 0:48][1]
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            stripes = np.sin(x / (1.5 + number) + rng.uniform(0, 6))[..., None]
            colour = np.roll([120, 60, 30], number)
            pixels = 128 + stripes * colour + rng.normal(0, 20, (40, 48, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def config() -> Config:
    return CONFIG


@pytest.fixture(scope="session")
def bucket(store_server) -> ObjectStore:
    """One bucket for the runs of these tests; each run has a name of its own."""
    store = ObjectStore(store_server.start())
    store.ensure_bucket("evaluation")
    return store


@pytest.fixture(scope="session")
def make_run(bucket, tmp_path_factory):
    """Make ``s3://evaluation/runs/<name>`` with data and both backbones of what ``paint`` puts into a folder."""
    # Here, for the tests of promotion need none of it and start seconds earlier.
    import torch

    from esvit_core.data.ingest.prepare import prepare
    from esvit_core.models.factory import create_backbone
    from esvit_core.weights.backbone import save_backbone

    def make(name: str, paint, transfer=()) -> str:
        run = f"s3://evaluation/runs/{name}"
        prepare(str(paint(tmp_path_factory.mktemp(name))), bucket, f"{run}/data", CONFIG.data, seed=0)
        for set_name, paint_set in dict(transfer).items():
            source = str(paint_set(tmp_path_factory.mktemp(f"{name}-{set_name}")))
            prepare(source, bucket, f"{run}/transfer/{set_name}", CONFIG.data, seed=0)
        for seed, place in enumerate(("backbone", "baseline")):
            torch.manual_seed(seed)
            network = create_backbone(CONFIG.model, img_size=32).eval()
            save_backbone(bucket, f"{run}/{place}", network, CONFIG, {"run": run, "step": 1 - seed})
        return run

    return make


def split(folder: Path) -> Path:
    draw(folder / "train", {"red": 12, "green": 12, "blue": 1}, seed=1)
    draw(folder / "val", {"red": 6, "green": 5}, seed=2)
    return folder


@pytest.fixture(scope="session")
def run(make_run) -> str:
    """Labelled: three classes of 12, 12 and 1 training images, 11 held-out ones of two of them; two transfer sets."""
    unlabelled = {"plain": lambda folder: draw(folder, {"": 20})}
    return make_run("labelled", split, {"stripes": split} | unlabelled)


@pytest.fixture(scope="session")
def unlabelled_run(make_run) -> str:
    return make_run("unlabelled", lambda folder: draw(folder, {"": 20}))

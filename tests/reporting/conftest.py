"""A finished run without a training: everything that the report reads is written as the steps write it."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.evaluation.outcomes import keep_outcomes, pack_outcomes
from esvit_core.evaluation.results import left_out, measured, result_uri
from esvit_core.reporting.report import write_report
from esvit_core.storage import ObjectStore

CLASSES = ["birds", "<b>bugs</b> & more", "fruit"]
PER_CLASS, NAME = 20, "tiny-0123456789"
NOTE = "1 class with a single training image: fruit"
CONFIG = Config.from_mapping(
    {
        "recipe": "tiny",
        "data": {"val_fraction": 0.25, "max_bad_fraction": 0.2},
        "augment": {
            "global_crops": {"size": 32, "number": 2, "scale": (0.4, 1.0)},
            "local_crops": {"size": 16, "number": 2, "scale": (0.05, 0.4)},
        },
        "model": {"arch": "swin", "embed_dim": 64, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
        "head": {"out_dim": 512},
        "evaluation": {
            "resize": 36,
            "crop": 32,
            "knn_k": (10, 20),
            "transfer": [{"name": "digits", "source": "digits"}, {"name": "shapes", "source": "shapes"}],
        },
    }
)
KNN = {"trained": {"knn/10": 36.125, "knn/20": 34.9375}, "baseline": {"knn/10": 31.0, "knn/20": 30.6875}}
LINEAR = {"trained": {"linear": 41.25, "linear/best": 43.0}, "baseline": {"linear": 36.5, "linear/best": 36.75}}
DIGITS = {"trained": {"transfer/digits": 88.5}, "baseline": {"transfer/digits": 91.0}}


def write_images(folder: Path, classes: list[str], count: int = PER_CLASS) -> Path:
    """Coloured noise, a folder a class (none for no classes), and two files that are no images."""
    rng = np.random.default_rng(0)
    for place in [folder / name.replace("/", "_") for name in classes] or [folder]:
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC).save(place / f"{i:03}.png")
        (place / "empty.jpg").write_bytes(b"")
        (place / "broken <script>.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    return folder


def log_lines(steps: int, region: bool = True) -> list[dict]:
    """Lines such as training writes, every five steps."""
    lines = []
    for step in range(5, steps + 1, 5):
        done = step / steps
        wave = 0.05 * math.sin(step / 7)
        view, of_regions = 5.2 + math.exp(-3 * done) + wave, 5.6 + 0.6 * math.exp(-2 * done) - wave
        line = {
            "step": step,
            "epoch": step // 20,
            "loss": 0.5 * (view + of_regions) if region else view,
            "loss_view": view,
            "loss_region": of_regions if region else None,
            "lr": 0.002 * min(1, done * 8) * (1 + math.cos(math.pi * done)) / 2,
            "weight_decay": 0.04 + 0.36 * done**2,
            "teacher_temp": 0.04 + 0.03 * min(1, 4 * done),
            "teacher_momentum": 1 - 0.02 * (1 + math.cos(math.pi * done)) / 2,
            "grad_norm": 2 + math.exp(-4 * done) + 4 * abs(wave),
            "images_per_second": 300 + 400 * wave,
            "data_wait": 0.02 + abs(wave) / 5,
            "entropy_view": 5.9 + 4 * wave * (1 - done),
            "entropy_region": 6.0 - 2 * wave if region else None,
            "kl_view": 2.0 * done + 0.2 + wave,
            "kl_region": 1.2 * done + 0.1 - wave if region else None,
            "student_kl_view": 1.5 * (1 - done) + 0.3 + wave,
            "student_kl_region": 1.2 * (1 - done) + 0.4 - wave if region else None,
            "prototypes_view": 20 + step // 20,
            "prototypes_region": 90 + step // 10 if region else None,
            "center_norm_view": 0.5 + done,
            "center_norm_region": 0.4 + done if region else None,
            "mutual_matches": 0.3 - 0.1 * done if region else None,
            "feature_std": 0.4 + 0.3 * done,
            "feature_rank": 5 + 20 * done,
            "warn": ["the same distribution for every <image>; lower objective.teacher_temp"] if step == 100 else None,
            "time": 1_700_000_000 + step,
        }
        lines.append({name: value for name, value in line.items() if value is not None})
    return lines


def summary_of(steps: int, resumes: list[int]) -> dict:
    return {
        "steps": steps,
        "epochs": steps // 20,
        "images": steps * 64,
        "seconds": 187.5,
        "images_per_second": 341.3,
        "final_loss": 5.4321,
        "precision": "bfloat16",
        "processes": 2,
        "threads": 1,
        "resumes": resumes,
        "backbone": "s3://bucket/runs/a/backbone",
        "versions": {"python": "3.11.2", "esvit": "0.1.0", "torch": "2.14.1"},
        "hardware": {"processor": "Example CPU", "cores": 2, "memory_gib": 23.5},
    }


def write_training(store, run: str, steps: int = 400, resumes: tuple[int, ...] = (150,)) -> None:
    text = "".join(json.dumps(line) + "\n" for line in log_lines(steps))
    store.put_bytes(f"{run}/training/log/00000005-1.jsonl", text.encode())
    store.put_json(f"{run}/training/summary.json", summary_of(steps, list(resumes)))
    description = {
        "format": "esvit-backbone/1",
        "arch": "swin",
        "parameters": 1_234_567,
        "num_features": 128,
        "weights": {"sha256": "c0ffee" * 10},
    }
    files = {"model.safetensors": b"weights", "backbone.json": json.dumps(description).encode()}
    store.publish(f"{run}/backbone", files, "backbone")


def with_outcomes(result: dict, images: int) -> dict:
    """Add the outcomes of so many images, which agree with the figures; the best epoch has none."""
    rng = np.random.default_rng(7)
    figures = result["results"]
    correct: dict[str, dict[str, np.ndarray]] = {"trained": {}, "baseline": {}}
    for key in figures["trained"]:
        if key == "linear/best":
            continue
        difficulty = rng.random(images)
        for model in ("trained", "baseline"):  # right on the easiest images, in an order that differs a little
            order = np.argsort(difficulty + rng.normal(0, 0.12, images))
            correct[model][key] = np.isin(np.arange(images), order[: round(images * figures[model][key] / 100)])
    return keep_outcomes(result, pack_outcomes("images", correct))


def write_results(store, run: str, classes: list[str]) -> None:
    counts = np.full((len(classes), len(classes)), 1) + 3 * np.eye(len(classes), dtype=int)
    results = {
        "knn": measured(
            "knn/20", KNN, classes, notes=[NOTE], top5={"trained": {"knn/10": 80.0, "knn/20": 81.5}, "baseline": {}}
        ),
        "linear": measured("linear", LINEAR, classes, notes=[NOTE], confusion=counts.tolist()),
        "transfer-digits": measured("transfer/digits", DIGITS, ["0", "1"], samples={"train": 900, "val": 400})
        | {"lambda": {"trained": 0.75, "baseline": 1.0}, "metric": "accuracy"},
    }
    for name, result in results.items():
        result = with_outcomes(result, 400 if name == "transfer-digits" else 1600)
        if not classes and not name.startswith("transfer"):
            result = left_out(result["headline"], "the images have no labels; put each class into a folder of its own")
        store.put_json(result_uri(run, name), {"name": name} | result | {"seconds": 1.5})


def write_drawings(store, run: str) -> None:
    image = io.BytesIO()
    Image.new("RGBA", (600, 300), (40, 90, 200, 128)).save(image, format="PNG")
    index = {
        "images": [{"file": "correspondence.png", "title": "Correspondence", "caption": "Lines join <regions>."}],
        "figures": {"correspondence": {"trained": 52.5, "baseline": 31.25, "chance": 12.5}},
        "left_out": [{"what": "attention", "reason": "resnet50 has no attention"}],
    }
    files = {"correspondence.png": image.getvalue(), "visualization.json": json.dumps(index).encode()}
    store.publish(f"{run}/visualization", files, "images")


@dataclass(frozen=True)
class Run:
    """A run in the store and what was put into it."""

    uri: str
    config: Config
    classes: list[str]
    figures: dict[str, tuple[float, float]]  # of each key: trained, baseline


@pytest.fixture
def config() -> Config:
    return CONFIG


@pytest.fixture
def log():
    """A function that gives the lines of a training log of so many steps."""
    return log_lines


def write_run(
    store: ObjectStore,
    uri: str,
    folder: Path,
    classes: list[str] = CLASSES,
    training: bool = True,
    results: bool = True,
    drawings: bool = True,
    resumes: tuple[int, ...] = (150,),
) -> Run:
    """A run in the store, by default everything but one transfer set and the attention maps."""
    prepare(str(write_images(folder / "clipart", classes)), store, f"{uri}/data", CONFIG.data, CONFIG.seed)
    if training:
        write_training(store, uri, resumes=resumes)
    if results:
        write_results(store, uri, classes)
    if drawings:
        write_drawings(store, uri)
    parts = (KNN, LINEAR, DIGITS)
    figures = {key: (part["trained"][key], part["baseline"][key]) for part in parts for key in part["trained"]}
    return Run(uri, CONFIG, classes, figures if results else {})


@pytest.fixture
def make_run(store, tmp_path):
    """A function that writes a run of the test's own; see :func:`write_run`."""
    return lambda **parts: write_run(store, store.uri(f"runs/{NAME}"), tmp_path, **parts)


@pytest.fixture(scope="session")
def shared_store(store_server) -> ObjectStore:
    """The session's server with a bucket that holds the finished run."""
    shared = ObjectStore(store_server.start())
    shared.ensure_bucket("shared-report")
    return shared


@pytest.fixture(scope="session")
def finished_run(shared_store, tmp_path_factory) -> Run:
    """A run with everything but one transfer set and the attention maps; no test changes it."""
    return write_run(shared_store, f"s3://shared-report/runs/{NAME}", tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def finished_html(shared_store, finished_run) -> str:
    """Its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESVIT_COMMIT", "0123abc")
        return write_report(finished_run.uri, shared_store, finished_run.config)

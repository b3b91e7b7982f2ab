"""`esvit evaluate` on this machine: a published backbone through all steps, and what --model can name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from esvit_core.errors import UserError
from esvit_core.storage import ObjectStore
from esvit_core.storage.embedded import EmbeddedStore
from esvit_pipelines.local.evaluate import backbone_address

Esvit = Callable[..., Any]


@pytest.fixture(scope="module")
def arguments(
    finished_run: Any, images: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[str]]]:
    """A folder with the backbone of the finished run and other images, and the command that evaluates it there.

    Its store runs all the time, so that no command has to start it.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(finished_run.here / "backbone", folder / "backbone")
    shutil.copy2(finished_run.folder / "micro.yaml", folder / "micro.yaml")
    images.folder(folder / "images", ["lines", "waves"], 12)
    _images_with_masks(folder / "shapes")
    command = ["evaluate", "--model", "backbone", "--data", "images", "--recipe", "micro.yaml", "--out", "out"]
    # Of one block, as features in a file are: then they are compared with the same results.
    settings = ("retrieval=true", "few_shot=[2]", f"segmentation={folder / 'shapes'}", "linear.last_blocks=1")
    server = EmbeddedStore(folder / "out" / "store")
    server.start()
    yield folder, [*command, *(word for setting in settings for word in ("--set", f"evaluation.{setting}"))]
    server.stop()


def _images_with_masks(folder: Path) -> None:
    """Six gray images with a white square, and masks of the square."""
    for number in range(6):
        mask = np.zeros((32, 32), np.uint8)
        mask[4 * number : 4 * number + 12, 8:20] = 1
        for place, pixels in (("images", 100 + 155 * mask), ("masks", mask)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / place / f"{number}.png")


@pytest.fixture(scope="module")
def evaluated(arguments: tuple[Path, list[str]], esvit: Esvit) -> str:
    folder, command = arguments
    done = esvit(*command, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_a_backbone_in_a_folder_is_evaluated_and_reported(evaluated: str, arguments: tuple[Path, list[str]]) -> None:
    folder = arguments[0]
    assert f"which evaluates {folder / 'backbone'}" in evaluated
    assert re.search(r"^ *5-NN .*%", evaluated, re.MULTILINE)
    (report,) = folder.glob("out/evaluate-micro-*/report.html")
    assert f"report    {report.relative_to(folder)}" in evaluated
    assert "it does not promote" in report.read_text(encoding="utf-8")


def test_the_figures_and_the_model_card_are_files_beside_the_report(evaluated: str, arguments: Any) -> None:
    folder = arguments[0]
    (report,) = folder.glob("out/evaluate-micro-*/report.html")
    values = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    assert {"knn/5", "linear"} <= {row["figure"] for row in values["results"]}
    assert "## Results" in report.with_suffix(".md").read_text(encoding="utf-8")
    card = (folder / "backbone" / "README.md").read_text(encoding="utf-8")  # copied with the run's backbone
    assert card.startswith("---\nlibrary_name: esvit") and "## Intended use" in card


def test_what_is_off_by_default_is_measured_when_it_is_asked_for(evaluated: str) -> None:
    for label in ("retrieval, mAP", "retrieval, R@1", "2-shot", "region mIoU"):
        assert re.search(rf"^ *{label} .*%", evaluated, re.MULTILINE), label


def test_nothing_is_trained_or_promoted(evaluated: str) -> None:
    assert "pretrain" not in evaluated
    assert "promoted" not in evaluated and "Use it:" not in evaluated


@dataclass(frozen=True)
class Compared:
    """The results of comparing features of the backbone with the backbone itself, found again, and with another network.

    Args:
        folder: the working directory.
        other: the other network.
        output: what the command printed.
        differences: of the comparison's page.
    """

    folder: Path
    other: str
    output: str
    differences: list[dict[str, Any]]


@pytest.fixture(scope="module")
def compared(evaluated: str, arguments: tuple[Path, list[str]], esvit: Esvit) -> Compared:
    folder, command = arguments
    embedded = esvit("embed", "--model", "backbone", "--data", "images", "--out", "features.parquet", cwd=folder)
    assert embedded.returncode == 0, embedded.stdout + embedded.stderr
    other = f"timm:test_resnet.r160_in1k:{_random_weights(folder)}"
    command = [word if word != "backbone" else "features.parquet" for word in command]
    done = esvit(*command, "--baseline", "backbone", "--baseline", other, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = folder.glob("out/comparison-*/comparison.html")
    differences = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))["differences"]
    return Compared(folder, other, done.stdout, differences)


def test_a_repeated_evaluation_finds_the_results(evaluated: str, compared: Compared) -> None:
    assert len(list(compared.folder.glob("out/evaluate-micro-*"))) == 1
    results = evaluated.rpartition("measure ")[2].partition("finished in")[0]
    assert "5-NN" in results and results in compared.output


def test_several_are_compared_on_the_same_images(compared: Compared, esvit: Esvit) -> None:
    assert f"features.parquet is better than {compared.other} on" in compared.output
    pairs = [pair for pair in compared.differences if pair["reference"] == compared.other]
    assert {pair["figure"] for pair in pairs} >= {"knn/5", "linear"}
    assert all("interval" in pair for pair in pairs if pair["figure"].startswith("knn/") or pair["figure"] == "linear")
    names = sorted(path.parent.name for path in compared.folder.glob("out/evaluate-*/report.html"))
    again = esvit("compare", *names, "--out", "out", cwd=compared.folder)
    assert again.returncode == 0 and "compared with" in again.stdout
    alone = esvit("compare", names[0], "--out", "out", cwd=compared.folder)
    assert alone.returncode == 2 and "it cannot be compared with itself" in alone.stderr


def test_the_features_of_a_backbone_are_as_good_as_the_backbone(compared: Compared) -> None:
    pairs = {pair["figure"]: pair for pair in compared.differences if pair["reference"] == "backbone"}
    assert {"knn/5", "linear", "retrieval/map", "few-shot/2"} <= pairs.keys()
    assert {pair["points"] for pair in pairs.values()} == {0.0}
    (report,) = compared.folder.glob("out/evaluate-features-*/report.html")
    text = report.read_text(encoding="utf-8")
    assert "this needs the network" in text and "Features of a file, without a baseline" in text
    assert "Nearest neighbors" in text and "Feature map" in text and "load_backbone" not in text
    assert not report.with_name("model-card.md").exists()


def test_features_that_do_not_fit_the_images_are_one_line(arguments: tuple[Path, list[str]], esvit: Esvit) -> None:
    folder, command = arguments
    np.savez(folder / "other.npz", name=np.array(["x.png"]), view=np.zeros((1, 3), np.float32))
    done = esvit(*[word if word != "backbone" else "other.npz" for word in command], cwd=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "features other.npz: 24 of 24 images have no row, such as " in done.stderr


def _random_weights(folder: Path) -> str:
    import timm
    import torch

    torch.save(timm.create_model("test_resnet.r160_in1k", num_classes=3).state_dict(), folder / "timm.pth")
    return str(folder / "timm.pth")


def test_a_missing_backbone_is_one_line(
    arguments: tuple[Path, list[str]], call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = arguments
    monkeypatch.chdir(folder)
    code, _, errors = call(*[word if word != "backbone" else "nobody" for word in command])
    assert code == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: --model nobody: no such file, and no pointer")


@pytest.fixture
def bucket(store: Any) -> str:
    """A bucket with three runs, one of which has the name of a pointer."""
    for name in ("demo-1234", "demo-1299", "champion"):
        store.put_bytes(store.uri(f"runs/{name}/config.yaml"), b"")
    return str(store.bucket)


def test_a_run_is_named_by_its_name_or_a_prefix(store: ObjectStore, bucket: str) -> None:
    for name in ("demo-1234", "demo-123"):
        assert backbone_address(name, bucket, store) == f"s3://{bucket}/runs/demo-1234"
    with pytest.raises(UserError, match=r"^--model demo-12: 2 runs have this prefix \(.*demo-1234.*\)"):
        backbone_address("demo-12", bucket, store)


def test_a_pointer_precedes_a_run_of_its_name(store: ObjectStore, bucket: str) -> None:
    assert backbone_address("champion", bucket, store) == f"s3://{bucket}/runs/champion"
    store.swap_pointer(f"s3://{bucket}/pointers/champion", {"backbone": f"s3://{bucket}/runs/demo-1234/backbone"}, None)
    assert backbone_address("champion", bucket, store) == "champion"


@pytest.mark.parametrize("model", ["s3://b/runs/demo-1234", "timm:resnet18", "folder/weights.pth", "nothing"])
def test_everything_else_is_left_to_the_import(model: str, store: ObjectStore, bucket: str) -> None:
    assert backbone_address(model, bucket, store) == model

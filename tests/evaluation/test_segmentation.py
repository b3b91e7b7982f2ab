"""Segmentation by a linear head on frozen regions, on made shapes with masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from esvit_core.config import Config
from esvit_core.errors import UserError
from esvit_core.evaluation.masked_images import IGNORED, find_pairs, read_mask, read_masked_images
from esvit_core.evaluation.plots import classes_over, segmentation_figure
from esvit_core.evaluation.segmentation import (
    IMAGES_SHOWN,
    SegmentationOutcome,
    mean_iou,
    measure_segmentation,
    miou_difference,
    region_classes,
    region_iou,
)

SIDE = 32
CONFIG = Config.from_mapping({"evaluation": {"crop": SIDE, "resize": SIDE, "batch_size": 8}})


def shapes(folder: Path, count: int = 20) -> Path:
    """Squares and disks of two colors on gray ground, and masks with their classes."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    for number in range(count):
        mask = np.zeros((SIDE, SIDE), np.uint8)
        top, left = rng.integers(0, 12, 2)
        mask[top : top + 14, left : left + 14] = 1
        mask[(y - 24) ** 2 + (x - rng.integers(18, 26)) ** 2 < 36] = 2
        colors = np.array([[128, 128, 128], [200, 60, 60], [60, 60, 200]])[mask]
        pixels = (colors + rng.normal(0, 10, colors.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")
    return folder


class Regions(nn.Module):
    """Mean color of each region; blurred over the whole image by ``blind``."""

    def __init__(self, blind: bool) -> None:
        super().__init__()
        self.blind, self.weight = blind, nn.Parameter(torch.zeros(1))

    def views_and_regions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        regions = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(2).mT  # (B, 64, 3)
        if self.blind:
            regions = regions.mean(1, keepdim=True) + 0.01 * regions.flip(1)
        return regions.mean(1), regions


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    train, test = read_masked_images(str(shapes(tmp_path_factory.mktemp("shapes") / "a", 40)), None, SIDE)
    assert len(train) + len(test) == 40 and 4 <= len(test) <= 14
    networks = {"trained": Regions(blind=False), "baseline": Regions(blind=True)}
    measured, outcomes = measure_segmentation(train, test, networks, CONFIG)
    maps = {model: outcomes[model].maps for model in ("baseline", "trained")}
    assert all(len(each) == IMAGES_SHOWN for each in maps.values())
    with Image.open(io.BytesIO(segmentation_figure(test, maps))) as figure:
        assert figure.format == "PNG" and figure.height > figure.width / 2  # four rows of four columns
    return measured


def test_regions_that_show_the_shapes_are_better_and_the_interval_excludes_0(result: dict) -> None:
    assert result["results"]["trained"]["segmentation"] > result["results"]["baseline"]["segmentation"] + 10
    difference = result["differences"]["segmentation"]
    assert difference["decision"] == "better" and difference["interval"][0] > 0
    assert difference["images"] == result["samples"]["val"]


def test_regions_are_retrieved_by_their_class(result: dict) -> None:
    figures = {model: values["segmentation/retrieval"] for model, values in result["results"].items()}
    assert figures["trained"] > 80 and figures["trained"] > figures["baseline"] + 10
    difference = result["differences"]["segmentation/retrieval"]
    assert difference["decision"] == "better"
    assert difference["points"] == pytest.approx(figures["trained"] - figures["baseline"], abs=1e-3)


def test_overlays_color_classes_and_leave_ground_and_ignored_pixels_gray() -> None:
    image = np.full((2, 2, 3), (200, 40, 90), np.uint8)
    drawn = classes_over(image, np.array([[0, 1], [2, IGNORED]], np.uint8))
    gray = (np.ptp(drawn, axis=2) < 1e-6).tolist()
    assert gray == [[True, False], [False, True]] and not np.allclose(drawn[0, 1], drawn[1, 0])


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/cat/1.jpg", "masks/cat/1.png"),
        ("VOC2007/JPEGImages/000033.jpg", "VOC2007/SegmentationClass/000033.png"),
        ("ADE/images/training/ADE_1.jpg", "ADE/annotations/training/ADE_1.png"),
        ("images/Abyssinian_1.jpg", "annotations/trimaps/Abyssinian_1.png"),
        ("jpg/image_00001.jpg", "segmim/segmim_00001.jpg"),
    ],
    ids=["masks", "VOC", "ADE20K", "Pets", "Flowers"],
)
def test_images_and_masks_are_paired_in_the_layouts_in_which_they_are_distributed(image: str, mask: str) -> None:
    others = ["README.md", "annotations/trimaps/._Abyssinian_1.png", "images/alone.jpg"]
    assert find_pairs([mask, image, *others]) == [(image, mask)]


def test_masks_are_read_from_palettes_gray_images_and_the_blue_ground_of_flowers() -> None:
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(classes).convert("P")
    palette.putdata(classes.ravel().tolist())
    color = Image.fromarray(np.array([[[0, 0, 254], [200, 150, 30]]], np.uint8))
    for image, expected in ((palette, classes), (Image.fromarray(classes), classes), (color, np.array([[0, 1]]))):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert np.array_equal(read_mask(file.getvalue(), "mask.png"), expected)
    with pytest.raises(UserError, match=r"^mask broken.png: it cannot be decoded"):
        read_mask(b"nothing", "broken.png")


def test_a_head_that_knows_the_ground_only_does_not_win_the_choice_of_lambda() -> None:
    truth = np.repeat([0, 1, 2], [80, 10, 10])
    ground, guessed = np.zeros(100, int), truth.copy()
    guessed[55:80] = 1  # more wrong regions than with the ground alone, but all of the two other classes are found
    assert (ground == truth).mean() > (guessed == truth).mean()
    assert region_iou(ground, truth, 3) == pytest.approx(80 / 100 / 3)
    assert region_iou(guessed, truth, 3) > region_iou(ground, truth, 3)


def test_a_region_has_the_most_frequent_class_of_its_pixels() -> None:
    mask = np.array([[1, 1, 2, IGNORED], [1, 0, IGNORED, IGNORED], [0, 0, 2, 2], [0, 1, 2, 0]], np.uint8)
    assert region_classes(mask, 2, 3).tolist() == [1, -1, 0, 2]


def test_equal_heads_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    union = rng.integers(10, 20, (12, 3))
    outcome = SegmentationOutcome(union - rng.integers(0, 9, (12, 3)), union, 1.0)
    difference = miou_difference(outcome, outcome)
    assert (difference.points, difference.p, difference.discordant) == (0, 1, 0)
    assert mean_iou(np.array([[1, 0]]), np.array([[2, 0]])) == 0.5


def test_a_source_without_masks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"no image has a mask; expected folders such as images and masks"):
        read_masked_images(str(tmp_path), None, SIDE)

"""The contact sheet of the augmentation, and what the recipes for kinds of images change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_core.config import Config
from esvit_core.config.recipes import domain_names, domain_text
from esvit_core.data.image_sheet import augmentation_sheet, save_sheet
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.errors import UserError
from esvit_core.planning.auto_recipe import resolve_auto

SMALL = ["augment.global_crops.size=32", "augment.local_crops={size: 16, number: 3}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, images: Any) -> Path:
    made = tmp_path_factory.mktemp("sheet")
    images.folder(made / "images", ["a", "b"], 25)
    (made / "images" / "a" / "broken.png").write_bytes(b"no image")
    return made


def test_the_sheet_has_a_row_for_each_image_and_a_column_for_each_crop(folder: Path, tmp_path: Path) -> None:
    sheet = augmentation_sheet(str(folder / "images"), Config.load("demo", SMALL), images=4)
    wide, high = sheet.size
    assert (wide - 4) // 100 == 1 + 2 + 3 and (high - 20) // 100 == 4
    save_sheet(sheet, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as written:
        assert written.size == sheet.size
    again = augmentation_sheet(str(folder / "images"), Config.load("demo", SMALL), images=4)
    assert again.tobytes() == sheet.tobytes()


def test_a_file_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    sheet = Image.new("RGB", (4, 4))
    with pytest.raises(UserError, match=r"sheet\.xyz: unknown kind of image; name a \.png"):
        save_sheet(sheet, tmp_path / "sheet.xyz")
    with pytest.raises(UserError, match="cannot be written"):
        save_sheet(sheet, tmp_path / "none" / "sheet.png")


def crops_of(name: str, pixels: np.ndarray, index: int = 0) -> list[torch.Tensor]:
    return MultiCrop(Config.load(name, SMALL).augment)(pixels, sample_rng(0, 0, index))


def test_grey_keeps_the_channels_equal() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (40, 40, 1), np.uint8).repeat(3, 2)
    for number in range(5):
        for crop in crops_of("grey", grey, number):
            torch.testing.assert_close(crop[0], crop[1], atol=0.02, rtol=0)
            torch.testing.assert_close(crop[0], crop[2], atol=0.02, rtol=0)


def test_aerial_turns_crops_and_the_others_do_not() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :, :] = np.arange(64, dtype=np.uint8)[:, None, None] * 4  # darker above
    plain = "augment={jitter: 0, grayscale: 0, blur: [0, 0, 0], solarize: 0, rotate: %s, global_crops: {size: 32}}"

    def darkest(rotate: float, index: int) -> int:
        crop = MultiCrop(Config.load("demo", [plain % rotate]).augment)(pixels, sample_rng(0, 0, index))[0][0]
        return int(torch.stack([crop[0].mean(), crop[:, 0].mean(), crop[-1].mean(), crop[:, -1].mean()]).argmin())

    assert {darkest(0, index) for index in range(20)} == {0}
    assert {darkest(1, index) for index in range(40)} == {1, 2, 3}


def test_without_rotation_the_random_numbers_are_the_same() -> None:
    still = MultiCrop(Config.load("demo").augment).draw(40, 40, sample_rng(0, 0, 0))
    turned = MultiCrop(Config.load("demo", ["augment.rotate=1"]).augment).draw(40, 40, sample_rng(0, 0, 0))
    assert all(drawn.turns == 0 for drawn in still) and all(drawn.turns for drawn in turned)
    assert still[0] == turned[0]._replace(turns=0)


def test_documents_are_never_mirrored() -> None:
    config = Config.load("documents").augment
    draws = [drawn for n in range(20) for drawn in MultiCrop(config).draw(100, 100, sample_rng(0, 0, n))]
    assert not any(drawn.flip for drawn in draws)


@pytest.mark.parametrize("name", domain_names())
def test_a_recipe_for_a_kind_of_images_changes_what_auto_chooses(name: str, folder: Path) -> None:
    first = domain_text(name).splitlines()[0]
    assert first.startswith("# ") and (":" in first)
    plain, found = resolve_auto(str(folder / "images")), resolve_auto(str(folder / "images"), domain=name)
    assert found.config.recipe == name
    assert found.config.model == plain.config.model and found.config.training == plain.config.training
    assert (found.config.augment == plain.config.augment) == (name == "photos")
    assert any(line.strip().startswith(f"{name}: ") for line in found.lines())
    win = resolve_auto(str(folder / "images"), ["augment.flip=0.25"], domain=name)
    assert win.config.augment.flip == 0.25

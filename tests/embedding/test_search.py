"""The images that are most similar to a given one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esvit_core.config import Config
from esvit_core.embedding.search import search
from esvit_core.errors import UserError
from esvit_core.models import create_backbone
from esvit_core.weights.backbone import describe_backbone

CONFIG = Config.from_mapping(
    {
        "model": {
            **{"arch": "swin", "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]},
            "window_size": 4,
        },
        "augment": {"global_crops": {"size": 32}},
        "evaluation": {"resize": 32, "crop": 32},
    }
)


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    made = create_backbone(CONFIG.model, img_size=32, drop_path=0.0).eval()
    made.backbone_config = describe_backbone(made, CONFIG)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four red and four blue images, each a little different, in one folder per color."""
    made = tmp_path_factory.mktemp("search") / "images"
    noise = np.random.default_rng(0)
    for name, color in (("blue", (20, 30, 220)), ("red", (220, 30, 20))):
        (made / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.clip(np.array(color) + noise.integers(-15, 15, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(made / name / f"{number}.png")
    return made


def test_images_of_the_same_kind_are_nearest(backbone: Any, folder: Path, tmp_path: Path) -> None:
    query = tmp_path / "query.png"
    Image.new("RGB", (40, 40), (215, 35, 25)).save(query)
    found = search(backbone, str(folder), [str(query)], count=4)
    (matches,) = found.matches
    assert [match.label for match in matches] == ["red"] * 4
    similarities = [match.similarity for match in matches]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] <= 1.001
    assert found.sheet.size[0] > 5 * 96


def test_an_image_of_the_source_is_a_query_and_not_its_own_answer(backbone: Any, folder: Path) -> None:
    found = search(backbone, str(folder), ["blue/0.png", "red/1.png"], count=3)
    assert [[match.label for match in matches] for matches in found.matches] == [["blue"] * 3, ["red"] * 3]
    assert "blue/0.png" not in [match.name for match in found.matches[0]]


def test_a_query_that_is_no_image_is_one_line(backbone: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--query nowhere\.png: no such file, and no image of that name"):
        search(backbone, str(folder), ["nowhere.png"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--query .*broken\.png: not an image; name an image"):
        search(backbone, str(folder), [str(tmp_path / "broken.png")])

"""Measure the rate of augmentation including decoding: ours, and torchvision transforms on PIL images.

    python benchmarks/augment.py [folder or archive of images] [--images 64] [--rounds 3]

Both run in turn in this process on one thread, on the same encoded images (without a source: photo-like noise of
500 x 375 pixels). The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

from esvit_core.config import AugmentConfig, Config
from esvit_core.data.ingest.decode import BadImage, to_stored_image
from esvit_core.data.ingest.file_kinds import is_ignored
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.loading.augment import MultiCrop, sample_rng
from esvit_core.data.shards.reader import decode_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--recipe", default="imagenet_swin_tiny_w7")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = Config.load(arguments.recipe).augment
    encoded = read(arguments.source, arguments.images) if arguments.source else noise(arguments.images)
    paths: dict[str, Callable[[bytes, int], object]] = {"ours": ours(config), "plain": plain(config)}
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(arguments.rounds):
        for name, path in paths.items():
            start = time.process_time()
            for number, data in enumerate(encoded):
                path(data, number)
            rates[name].append(len(encoded) / (time.process_time() - start))
    best = {name: max(values) for name, values in rates.items()}
    ratio = best["ours"] / best["plain"]
    sizes = MultiCrop(config).sizes
    print(f"{len(encoded)} images, {sum(map(len, encoded)) / len(encoded) / 1024:.0f} kB each, crops of {sizes} px")
    print(
        f"ours {best['ours']:.0f}/s, plain {best['plain']:.0f}/s, processor time of one thread: {ratio:.2f} times as fast"
    )
    print(json.dumps({"ours": round(best["ours"], 1), "plain": round(best["plain"], 1), "ratio": round(ratio, 2)}))


def ours(config: AugmentConfig) -> Callable[[bytes, int], object]:
    multicrop = MultiCrop(config)
    return lambda data, number: multicrop(decode_image(data), sample_rng(0, 0, number))


def plain(config: AugmentConfig) -> Callable[[bytes, int], object]:
    """Torchvision's transforms on PIL images, one composition per kind of crop."""
    jitter = transforms.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)
    colours = [
        transforms.RandomHorizontalFlip(config.flip),
        transforms.RandomApply([jitter], p=config.jitter),
        transforms.RandomGrayscale(config.grayscale),
    ]
    end = [transforms.ToTensor(), transforms.Normalize(config.mean, config.std)]

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
        cut = transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
        rest = [Sometimes(blur, lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(*config.blur_sigma))))]
        return transforms.Compose([cut, *colours, *rest, Sometimes(solarize, ImageOps.solarize), *end])

    whole = config.global_crops
    crops = [
        crop(whole.size, whole.scale, config.blur[0], 0.0),
        crop(whole.size, whole.scale, config.blur[1], config.solarize),
    ]
    for part in config.local_kinds:
        crops += [crop(part.size, part.scale, config.blur[2], 0.0)] * part.number

    def run(data: bytes, number: int) -> object:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [make(image) for make in crops]

    return run


class Sometimes:
    """Apply a function with a probability."""

    def __init__(self, probability: float, function: Callable[[Image.Image], Image.Image]) -> None:
        self.probability, self.function = probability, function

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.function(image) if random.random() < self.probability else image


def read(source: str, count: int) -> list[bytes]:
    encoded: list[bytes] = []
    with open_source(source) as opened:
        for entry in opened.entries:
            if len(encoded) == count:
                break
            try:
                if not is_ignored(entry.name):
                    encoded.append(to_stored_image(opened.read(entry), 100, None, 100).data)
            except BadImage:
                continue
    return encoded


def noise(count: int) -> list[bytes]:
    """Encode images of noise at several scales, which compress about as well as photographs."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        total = np.zeros((375, 500, 3))
        for step in (2, 8, 32, 128):
            small = rng.normal(0, 15 * step**0.4, (375 // step + 2, 500 // step + 2, 3))
            planes = [Image.fromarray(small[..., c].astype(np.float32)).resize((500, 375)) for c in range(3)]
            total += np.stack([np.asarray(plane) for plane in planes], axis=-1)
        file = io.BytesIO()
        Image.fromarray((total + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
    return encoded


if __name__ == "__main__":
    main()

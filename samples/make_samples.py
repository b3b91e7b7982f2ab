"""Make the sample images from Debian's package ``openclipart-png`` and scikit-learn's digits.

    apt-get install openclipart-png
    python samples/make_samples.py

Writes clipart.zip, clipart-other.zip and digits.zip beside this file. The same package and the same versions of Pillow,
zlib and scikit-learn give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 64  # pixels
COLOURS = 128
MARGIN = 0.04  # white around the drawing, as a share of its longer side
MAX_PIXELS = 25_000_000  # the package has drawings of 600 megapixels
MIN_INK = 0.02  # share of pixels that are not white; white drawings on white show nothing

# Class -> files of the package. What shows one kind of thing, drawn in many ways.
CLIPART = {
    "aiga_symbols": "transportation/aiga-symbols/**/*.png",
    "arrows": "shapes/arrows/**/*.png",
    "beverages": "food/beverages/**/*.png",
    "birds": "animals/birds/**/*.png",
    "buildings": "buildings/**/*.png",
    "bugs": "animals/bugs/**/*.png",
    "clothing": "people/clothing/**/*.png",
    "desserts": "food/desserts/**/*.png",
    "flags": "signs_and_symbols/flags/**/*.png",
    "fruit": "food/fruit/**/*.png",
    "games": "recreation/games/**/*.png",
    "hardware": "computer/hardware/**/*.png",
    "icons": "computer/icons/flat-theme/**/*.png",
    "mammals": "animals/mammals/**/*.png",
    "map_symbols": "signs_and_symbols/map_symbols/**/*.png",
    "music": "recreation/music/**/*.png",
    "patterns": "special/patterns/**/*.png",
    "roadsigns": "transportation/roadsigns/**/*.png",
    "sports": "recreation/sports/**/*.png",
    "stars": "shapes/stars/**/*.png",
    "vehicles": "transportation/vehicles/**/*.png",
}
CLIPART_OTHER = {
    "buttons": "computer/buttons/**/*.png",
    "jigsaw": "shapes/jigsaw/**/*.png",
    "office": "office/**/*.png",
    "party": "recreation/party/**/*.png",
    "plants": "plants/**/*.png",
    "smilies": "people/smilies/**/*.png",
    "stickmen": "people/stickmen/**/*.png",
    "tools": "tools/*.png",
}
# Where the package's drawing failed: "Linked Image Not Found" instead of, or over, the image.
FAILED = ("stylized_yoga_person_", "tux_didier_fabert_01", "duck_yellow_ii_kurt_cagl_")
PER_CLASS, PER_OTHER_CLASS, PER_DIGIT = 200, 60, 100

NamedImage = tuple[str, bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, default=Path("/usr/share/openclipart/png"), help="where the PNGs are")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the archives go")
    arguments = parser.parse_args()
    if not arguments.package.is_dir():
        parser.error(f"{arguments.package} does not exist; apt-get install openclipart-png, or name it with --package")
    seen: set[bytes] = set()
    write_zip(arguments.out / "clipart.zip", clipart(arguments.package, CLIPART, PER_CLASS, seen))
    write_zip(arguments.out / "clipart-other.zip", clipart(arguments.package, CLIPART_OTHER, PER_OTHER_CLASS, seen))
    write_zip(arguments.out / "digits.zip", digits())


def clipart(package: Path, classes: dict[str, str], per_class: int, seen: set[bytes]) -> list[NamedImage]:
    """Up to ``per_class`` drawings of each class; none that is in ``seen``, where they are added."""
    images: list[NamedImage] = []
    for label, pattern in classes.items():
        taken = 0
        for path in in_fixed_order(package, pattern):
            drawing = draw(path)
            if drawing is None or (pixels := drawing.tobytes()) in seen:
                continue
            seen.add(pixels)
            images.append((f"{label}/{path.stem}-{name_digest(path, package)[:6]}.png", encode(drawing)))
            taken += 1
            if taken == per_class:
                break
        print(f"{label}: {taken}", flush=True)
    return sorted(images)


def in_fixed_order(package: Path, pattern: str) -> list[Path]:
    """The PNGs of a class in an order without meaning: series by one artist lie side by side by name."""
    found = (path for path in package.glob(pattern) if not path.name.startswith(FAILED))
    return sorted(found, key=lambda path: name_digest(path, package))


def name_digest(path: Path, package: Path) -> str:
    return hashlib.sha256(path.relative_to(package).as_posix().encode()).hexdigest()


def draw(path: Path) -> Image.Image | None:
    """The drawing on a white square, trimmed, SIDE pixels; None if it is too large, broken, or shows nothing."""
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                return None
            drawing = file.convert("RGBA")
    except OSError:
        return None
    flat = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    inked = np.asarray(flat).min(axis=2) < 250
    if not inked.any():
        return None
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    flat = flat.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    side = round(max(flat.size) * (1 + 2 * MARGIN))
    square = Image.new("RGB", (side, side), "white")
    square.paste(flat, ((side - flat.width) // 2, (side - flat.height) // 2))
    small = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return small if (np.asarray(small).min(axis=2) < 250).mean() >= MIN_INK else None


def digits() -> list[NamedImage]:
    """The first PER_DIGIT of each digit, dark on white, 8 x 8 pixels of 17 grey levels as they are in the set."""
    data = load_digits()
    images = []
    for digit in range(10):
        for number, place in enumerate(np.flatnonzero(data.target == digit)[:PER_DIGIT]):
            grey = 255 - np.round(data.images[place] * (255 / 16)).astype(np.uint8)
            images.append((f"{digit}/{number:03d}.png", encode(Image.fromarray(grey))))
    return images


def encode(image: Image.Image) -> bytes:
    """PNG, drawings with a palette."""
    if image.mode == "RGB":
        image = image.quantize(COLOURS, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_zip(path: Path, images: list[NamedImage]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # PNGs do not become smaller
        for name, data in images:
            archive.writestr(zipfile.ZipInfo(name), data)


if __name__ == "__main__":
    main()

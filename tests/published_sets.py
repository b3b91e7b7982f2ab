"""The transfer sets of the paper in miniature, each in the layout in which it is distributed."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy.io import savemat

Tree = dict[str, bytes]


def image(label: int, number: int, suffix: str = "jpg", side: int = 24) -> bytes:
    """An image whose color shows its class, with some noise."""
    rng = np.random.default_rng((label, number))
    color = np.array([[220, 40, 40], [40, 40, 220], [40, 200, 40]][label % 3])
    pixels = (color + rng.normal(0, 15, (side, side, 3))).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG", "png": "PNG", "ppm": "PPM"}[suffix])
    return file.getvalue()


def pixels(label: int, number: int, side: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image(label, number, "png", side))))


def mat(**variables: object) -> bytes:
    file = io.BytesIO()
    savemat(file, variables)
    return file.getvalue()


def lines(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def food101() -> Tree:
    tree: Tree = {}
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        names = {c: [f"{c}/{n}" for n in numbers] for c in ("apple_pie", "sushi")}
        tree[f"food-101/meta/{split}.json"] = json.dumps(names).encode()
        tree |= {f"food-101/images/{c}/{n}.jpg": image(i, n) for i, c in enumerate(names) for n in numbers}
    return tree


def _cifar(batches: dict[str, range], labels: bytes, meta: str, names: bytes, root: str) -> Tree:
    tree: Tree = {f"{root}/{meta}": pickle.dumps({names: [b"plane", b"ship"]})}
    for name, numbers in batches.items():
        rows = np.stack([pixels(n % 2, n, 32).transpose(2, 0, 1).ravel() for n in numbers])
        tree[f"{root}/{name}"] = pickle.dumps({b"data": rows, labels: [n % 2 for n in numbers]}, protocol=2)
    return tree


def cifar10() -> Tree:
    batches = {f"data_batch_{i}": range(2 * i, 2 * i + 2) for i in range(1, 6)} | {"test_batch": range(20, 24)}
    return _cifar(batches, b"labels", "batches.meta", b"label_names", "cifar-10-batches-py")


def cifar100() -> Tree:
    batches = {"train": range(6), "test": range(6, 8)}
    return _cifar(batches, b"fine_labels", "meta", b"fine_label_names", "cifar-100-python")


def sun397() -> Tree:
    tree: Tree = {}
    for part, numbers in (("Training_01.txt", range(3)), ("Testing_01.txt", range(3, 5))):
        names = [f"/{c[0]}/{c}/sun_{n}.jpg" for c in ("abbey", "bakery/shop") for n in numbers]
        tree[f"Partitions/{part}"] = lines(*names)
        tree |= {f"SUN397{name}": image(i // len(numbers), i) for i, name in enumerate(names)}
    return tree


def stanford_cars() -> Tree:
    tree: Tree = {"devkit/cars_meta.mat": mat(class_names=np.array(["Audi A4 2008", "BMW M3 2012"], dtype=object))}
    for split, table, count in (("train", "devkit/cars_train_annos", 4), ("test", "cars_test_annos_withlabels", 2)):
        kind = np.dtype([("bbox_x1", "f8"), ("class", "f8"), ("fname", "O")])
        rows = [(1.0, n % 2 + 1, f"{n + 1:05d}.jpg") for n in range(count)]
        tree[f"{table}.mat"] = mat(annotations=np.array(rows, dtype=kind))
        tree |= {f"cars_{split}/{n + 1:05d}.jpg": image(n % 2, n) for n in range(count)}
    return tree


def fgvc_aircraft() -> Tree:
    tree: Tree = {}
    for part, numbers in (("trainval", range(4)), ("test", range(4, 6))):
        rows = [f"{n:07d} {('707-320', 'A340-500')[n % 2]}" for n in numbers]
        tree[f"fgvc-aircraft-2013b/data/images_variant_{part}.txt"] = lines(*rows)
        tree |= {f"fgvc-aircraft-2013b/data/images/{n:07d}.jpg": image(n % 2, n) for n in numbers}
    return tree


def voc2007() -> Tree:
    tree: Tree = {}
    for part, numbers in (("trainval", range(8)), ("test", range(8, 14))):
        tree[f"VOCdevkit/VOC2007/ImageSets/Main/{part}.txt"] = lines(*(f"{n:06d}" for n in numbers))
        for n in numbers:
            labels = [("cat", 0)] if n % 2 else [("dog", 0), ("car", int(n % 4 == 0))]
            objects = "".join(
                f"<object><name>{label}</name><difficult>{difficult}</difficult></object>"
                for label, difficult in labels
            )
            tree[f"VOCdevkit/VOC2007/Annotations/{n:06d}.xml"] = f"<annotation>{objects}</annotation>".encode()
            tree[f"VOCdevkit/VOC2007/JPEGImages/{n:06d}.jpg"] = image(n % 2, n)
    return tree


def dtd() -> Tree:
    tree: Tree = {}
    for part, numbers in (("train1", range(2)), ("val1", range(2, 4)), ("test1", range(4, 6))):
        names = [f"{c}/{c}_{n:04d}.jpg" for c in ("banded", "dotted") for n in numbers]
        tree[f"dtd/labels/{part}.txt"] = lines(*names)
        tree |= {f"dtd/images/{name}": image(int("dotted" in name), i) for i, name in enumerate(names)}
    return tree


def pets() -> Tree:
    tree: Tree = {}
    for part, numbers in (("trainval", range(1, 4)), ("test", range(4, 6))):
        names = [f"{c}_{n}" for c in ("Abyssinian", "great_pyrenees") for n in numbers]
        tree[f"annotations/{part}.txt"] = lines("#Image CLASS-ID SPECIES BREED ID", *(f"{n} 1 1 1" for n in names))
        tree |= {f"images/{name}.jpg": image(int("great" in name), i) for i, name in enumerate(names)}
    return tree


def caltech101() -> Tree:
    root = "caltech-101/101_ObjectCategories"
    counts = {"accordion": 32, "anchor": 33, "BACKGROUND_Google": 2}
    return {
        f"{root}/{c}/image_{n:04d}.jpg": image(i, n, side=8)
        for i, (c, k) in enumerate(counts.items())
        for n in range(k)
    }


def flowers102() -> Tree:
    sets = {"trnid": np.arange(1, 5), "valid": np.arange(5, 7), "tstid": np.arange(7, 11)}
    labels = np.array([[n % 2 + 1 for n in range(10)]])
    tree: Tree = {"imagelabels.mat": mat(labels=labels), "setid.mat": mat(**sets)}
    return tree | {f"jpg/image_{n + 1:05d}.jpg": image(n % 2, n) for n in range(10)}


def mnist() -> Tree:
    tree: Tree = {}
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.stack([pixels(n % 2, n, 28)[..., 0] for n in range(count)])
        data = struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes()
        tree[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(data)
        labels = np.arange(count, dtype=np.uint8) % 2
        tree[f"{part}-labels-idx1-ubyte"] = struct.pack(">HBBI", 0, 8, 1, count) + labels.tobytes()
    return tree


def fer2013() -> Tree:
    usages = ["Training"] * 4 + ["PublicTest"] * 2 + ["PrivateTest"] * 2
    rows = [
        f"{3 + n % 2},{' '.join(map(str, pixels(n % 2, n, 48)[..., 0].ravel()))},{usage}"
        for n, usage in enumerate(usages)
    ]
    return {"fer2013/fer2013.csv": lines("emotion,pixels,Usage", *rows)}


def stl10() -> Tree:
    tree: Tree = {"stl10_binary/class_names.txt": lines("airplane", "bird")}
    for split, count in (("train", 4), ("test", 2)):
        images = np.stack([pixels(n % 2, n, 96).transpose(2, 1, 0) for n in range(count)])
        tree[f"stl10_binary/{split}_X.bin"] = images.tobytes()
        tree[f"stl10_binary/{split}_y.bin"] = bytes(n % 2 + 1 for n in range(count))
    return tree


def gtsrb() -> Tree:
    tree: Tree = {}
    for label in range(2):
        for n in range(3):
            tree[f"GTSRB/Final_Training/Images/{label:05d}/00000_{n:05d}.ppm"] = image(label, n, "ppm")
    rows = [f"{n:05d}.ppm;24;24;1;1;20;20;{n % 2}" for n in range(4)]
    tree["GT-final_test.csv"] = lines("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId", *rows)
    return tree | {f"GTSRB/Final_Test/Images/{n:05d}.ppm": image(n % 2, n, "ppm") for n in range(4)}


def patch_camelyon() -> Tree:
    import h5py

    tree: Tree = {}
    for part, count in (("train", 4), ("valid", 2), ("test", 2)):
        images = np.stack([pixels(n % 2, n, 96) for n in range(count)])
        labels = (np.arange(count) % 2).reshape(-1, 1, 1, 1)
        for key, values in (("x", images), ("y", labels)):
            file = io.BytesIO()
            with h5py.File(file, "w") as written:
                written[key] = values
            tree[f"camelyonpatch_level_2_split_{part}_{key}.h5"] = file.getvalue()
    return tree


def ucf101() -> Tree:
    tree: Tree = {}
    for part, groups in (("trainlist01.txt", range(8, 11)), ("testlist01.txt", range(1, 3))):
        names = [f"{c}/v_{c}_g{g:02d}_c01" for c in ("Archery", "Biking") for g in groups]
        numbered = part.startswith("train")
        tree[f"ucfTrainTestlist/{part}"] = lines(*(f"{n}.avi 1" if numbered else f"{n}.avi" for n in names))
        tree |= {f"UCF-101-midframes/{n}.jpg": image(int("Biking" in n), i) for i, n in enumerate(names)}
    return tree


def hateful_memes() -> Tree:
    tree: Tree = {}
    for part, numbers in (("train", range(4)), ("dev_seen", range(4, 8))):
        rows = [json.dumps({"id": n, "img": f"img/{n:05d}.png", "label": n % 2, "text": "a"}) for n in numbers]
        tree[f"hateful_memes/{part}.jsonl"] = lines(*rows)
        tree |= {f"hateful_memes/img/{n:05d}.png": image(n % 2, n, "png") for n in numbers}
    return tree


#: Name of each set, what makes it, and the numbers of training and test images.
SETS: dict[str, tuple[Callable[[], Tree], int, int]] = {
    "food101": (food101, 8, 4),
    "cifar10": (cifar10, 10, 4),
    "cifar100": (cifar100, 6, 2),
    "sun397": (sun397, 6, 4),
    "stanford-cars": (stanford_cars, 4, 2),
    "fgvc-aircraft": (fgvc_aircraft, 4, 2),
    "voc2007": (voc2007, 8, 6),
    "dtd": (dtd, 8, 4),
    "pets": (pets, 6, 4),
    "caltech101": (caltech101, 60, 5),
    "flowers102": (flowers102, 6, 4),
    "mnist": (mnist, 6, 4),
    "fer2013": (fer2013, 6, 2),
    "stl10": (stl10, 4, 2),
    "gtsrb": (gtsrb, 6, 4),
    "patch-camelyon": (patch_camelyon, 6, 2),
    "ucf101": (ucf101, 6, 4),
    "hateful-memes": (hateful_memes, 4, 4),
}

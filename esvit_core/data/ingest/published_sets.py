"""Readers of the layouts in which the transfer sets of the paper are distributed.

A reader takes the files of a set and yields its images with their official splits and labels. It reads lists and
annotations with the standard library, ``.mat`` files with SciPy, and never runs code of a file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from esvit_core.errors import UserError

SplitName = Literal["train", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "test")


@dataclass(frozen=True)
class LabeledImage:
    """An image of a published set.

    Attributes:
        split: its official split; training and validation images are ``train``.
        label: its class; of several labels, 1, 0 (difficult) or -1 for each class.
        name: unique name within the set, with the suffix of an image.
        data: the encoded image.
    """

    split: SplitName
    label: str | tuple[int, ...]
    name: str
    data: bytes


class Files:
    """The files of a set, found by their name or by the end of their path.

    Args:
        names: paths of all files.
        read: returns the content of a file.
        origin: source of the set, for messages.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], bytes], origin: str) -> None:
        self.names, self._read, self.origin = sorted(names), read, origin
        self._by_end: dict[str, list[str]] = {}
        for name in self.names:
            self._by_end.setdefault(PurePosixPath(name).name, []).append(name)

    def find(self, end: str) -> str:
        """Return the path that ends with ``end``.

        Raises:
            UserError: there is none, or there are several.
        """
        last = PurePosixPath(end).name
        found = [n for n in self._by_end.get(last, []) if n == end or n.endswith(f"/{end}")]
        if len(found) != 1:
            many = "it is not there" if not found else f"there are {len(found)}: {', '.join(found[:3])}"
            raise UserError(f"{self.origin}: expected a file {end}, but {many}; unpack the set as it is distributed")
        return found[0]

    def has(self, end: str) -> bool:
        return any(n == end or n.endswith(f"/{end}") for n in self._by_end.get(PurePosixPath(end).name, []))

    def bytes(self, end: str) -> bytes:
        """Return the content of the file that ends with ``end``; a ``.gz`` beside it is unpacked."""
        if not self.has(end) and self.has(f"{end}.gz"):
            return gzip.decompress(self._read(self.find(f"{end}.gz")))
        return self._read(self.find(end))

    def text(self, end: str) -> str:
        return self.bytes(end).decode("utf-8")

    def lines(self, end: str) -> list[str]:
        return [line.strip() for line in self.text(end).splitlines() if line.strip()]

    def rows(self, end: str, delimiter: str = ",") -> list[dict[str, str]]:
        """Return the rows of a table with a header."""
        return list(csv.DictReader(io.StringIO(self.text(end)), delimiter=delimiter))

    def json(self, end: str) -> Any:
        return json.loads(self.text(end))

    def mat(self, end: str) -> dict[str, Any]:
        """Return the variables of a MATLAB file, structures as dictionaries."""
        from scipy.io import loadmat

        return loadmat(io.BytesIO(self.bytes(end)), simplify_cells=True)


Reader = Callable[[Files], Iterator[LabeledImage]]


def _files(files: Files, split: SplitName, entries: Mapping[str, str], folder: str) -> Iterator[LabeledImage]:
    """Yield the images below ``folder`` with these names and labels."""
    for name, label in entries.items():
        yield LabeledImage(split, label, name, files.bytes(f"{folder}/{name}" if folder else name))


def food101(files: Files) -> Iterator[LabeledImage]:
    """Food-101: ``meta/train.json`` and ``test.json`` list the images of each class."""
    for split in SPLITS:
        for label, names in files.json(f"meta/{split}.json").items():
            yield from _files(files, split, {f"{name}.jpg": label for name in names}, "images")


def _cifar(
    files: Files, batches: Mapping[SplitName, Sequence[str]], meta: str, names: bytes, labels: bytes
) -> Iterator[LabeledImage]:
    classes = [name.decode() for name in _plain_pickle(files.bytes(meta))[names]]
    for split, parts in batches.items():
        for part in parts:
            batch = _plain_pickle(files.bytes(part))
            for i, (row, label) in enumerate(zip(batch[b"data"], batch[labels], strict=True)):
                pixels = np.asarray(row, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
                yield LabeledImage(split, classes[int(label)], f"{part}-{i:05d}.png", _png(pixels))


def cifar10(files: Files) -> Iterator[LabeledImage]:
    """CIFAR-10, the Python version: five batches for training and one for testing."""
    batches: dict[SplitName, list[str]] = {
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
    }
    return _cifar(files, batches, "batches.meta", b"label_names", b"labels")


def cifar100(files: Files) -> Iterator[LabeledImage]:
    """CIFAR-100, the Python version, with its 100 fine labels."""
    return _cifar(files, {"train": ["train"], "test": ["test"]}, "meta", b"fine_label_names", b"fine_labels")


def sun397(files: Files) -> Iterator[LabeledImage]:
    """SUN397: the first partition, ``Training_01.txt`` and ``Testing_01.txt``; a line is /a/abbey/sun_....jpg."""
    for split, part in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        for line in files.lines(part):
            name = line.lstrip("/")
            label = "/".join(PurePosixPath(name).parts[1:-1])
            yield LabeledImage(split, label, name, files.bytes(name))  # type: ignore[arg-type]


def stanford_cars(files: Files) -> Iterator[LabeledImage]:
    """Stanford Cars: ``devkit/cars_train_annos.mat``, and ``cars_test_annos_withlabels.mat`` beside it."""
    classes = [str(name) for name in np.atleast_1d(files.mat("cars_meta.mat")["class_names"])]
    for split, table in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        for row in _records(files.mat(table)["annotations"]):
            entries = {str(row["fname"]): classes[int(row["class"]) - 1]}
            yield from _files(files, split, entries, f"cars_{split}")  # type: ignore[arg-type]


def fgvc_aircraft(files: Files) -> Iterator[LabeledImage]:
    """FGVC Aircraft: the variants; ``data/images_variant_trainval.txt`` has a number and a variant per line."""
    for split, part in (("train", "trainval"), ("test", "test")):
        pairs = [line.partition(" ") for line in files.lines(f"images_variant_{part}.txt")]
        yield from _files(files, split, {f"{n}.jpg": label for n, _, label in pairs}, "images")  # type: ignore[arg-type]


def voc2007(files: Files) -> Iterator[LabeledImage]:
    """PASCAL VOC 2007 classification: ``ImageSets/Main`` lists the images, the XML annotations their objects.

    A class that only difficult objects of an image have is 0: the metric ignores the image for this class.
    """
    for split, part in (("train", "trainval"), ("test", "test")):
        for name in files.lines(f"ImageSets/Main/{part}.txt"):
            found = dict.fromkeys(VOC_CLASSES, -1)
            for item in ElementTree.fromstring(files.text(f"Annotations/{name}.xml")).iter("object"):
                label, difficult = item.findtext("name", ""), item.findtext("difficult", "0").strip() == "1"
                found[label] = max(found[label], 0) if difficult else 1
            data = files.bytes(f"JPEGImages/{name}.jpg")
            yield LabeledImage(split, tuple(found.values()), f"{name}.jpg", data)  # type: ignore[arg-type]


def dtd(files: Files) -> Iterator[LabeledImage]:
    """Describable Textures: the first split; ``labels/train1.txt`` and ``val1.txt`` are for training."""
    for split, parts in (("train", ("train1", "val1")), ("test", ("test1",))):
        for part in parts:
            entries = {line: PurePosixPath(line).parts[0] for line in files.lines(f"labels/{part}.txt")}
            yield from _files(files, split, entries, "images")  # type: ignore[arg-type]


def pets(files: Files) -> Iterator[LabeledImage]:
    """Oxford-IIIT Pets: a line of ``annotations/trainval.txt`` is Abyssinian_100 1 1 1; the breed precedes the number."""
    for split, part in (("train", "trainval"), ("test", "test")):
        names = [line.split()[0] for line in files.lines(f"annotations/{part}.txt") if not line.startswith("#")]
        entries = {f"{name}.jpg": name.rpartition("_")[0] for name in names}
        yield from _files(files, split, entries, "images")  # type: ignore[arg-type]


def caltech101(files: Files) -> Iterator[LabeledImage]:
    """Caltech-101: a folder per class. There is no official split: the first 30 images of each class, by name, train.

    The background class is left out.
    """
    of_class: dict[str, list[str]] = {}
    for name in files.names:
        parts = PurePosixPath(name).parts
        if "101_ObjectCategories" in parts[:-2] and name.endswith(".jpg"):
            of_class.setdefault(parts[-2], []).append(name)
    of_class.pop("BACKGROUND_Google", None)
    for label, names in sorted(of_class.items()):
        for number, name in enumerate(names):
            short = "/".join(PurePosixPath(name).parts[-2:])
            yield LabeledImage("train" if number < _CALTECH_TRAIN else "test", label, short, files.bytes(name))


def flowers102(files: Files) -> Iterator[LabeledImage]:
    """Oxford Flowers-102: ``imagelabels.mat`` and ``setid.mat``; training and validation images train."""
    labels = np.atleast_1d(files.mat("imagelabels.mat")["labels"])
    sets = files.mat("setid.mat")
    for split, parts in (("train", ("trnid", "valid")), ("test", ("tstid",))):
        numbers = np.concatenate([np.atleast_1d(sets[part]) for part in parts])
        entries = {f"image_{number:05d}.jpg": f"{labels[number - 1]:03d}" for number in numbers.astype(int)}
        yield from _files(files, split, entries, "jpg")  # type: ignore[arg-type]


def mnist(files: Files) -> Iterator[LabeledImage]:
    """MNIST: four idx files, also packed by gzip."""
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = (_idx(files.bytes(f"{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
        for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            yield LabeledImage(split, str(int(label)), f"{part}-{i:05d}.png", _png(pixels))  # type: ignore[arg-type]


def fer2013(files: Files) -> Iterator[LabeledImage]:
    """FER 2013: ``fer2013.csv`` with the columns emotion, pixels and Usage; PublicTest trains, PrivateTest is the test."""
    for i, row in enumerate(files.rows("fer2013.csv")):
        pixels = np.array(row["pixels"].split(), dtype=np.uint8)
        side = int(len(pixels) ** 0.5)
        split: SplitName = "test" if row["Usage"] == "PrivateTest" else "train"
        yield LabeledImage(split, FER_CLASSES[int(row["emotion"])], f"{i:05d}.png", _png(pixels.reshape(side, side)))


def stl10(files: Files) -> Iterator[LabeledImage]:
    """STL-10, the binary version: ``train_X.bin`` has 3 x 96 x 96 bytes per image, column by column."""
    classes = files.lines("class_names.txt")
    for split in SPLITS:
        pixels = np.frombuffer(files.bytes(f"{split}_X.bin"), np.uint8).reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
        labels = np.frombuffer(files.bytes(f"{split}_y.bin"), np.uint8)
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            yield LabeledImage(split, classes[int(label) - 1], f"{split}-{i:05d}.png", _png(image))


def gtsrb(files: Files) -> Iterator[LabeledImage]:
    """GTSRB: a folder per class for training, ``GT-final_test.csv`` with the classes of the test images."""
    for name in files.names:
        if found := re.search(r"Final_Training/Images/(\d+)/([^/]+\.ppm)$", name):
            yield LabeledImage("train", found[1], f"{found[1]}/{found[2]}", files.bytes(name))
    for row in files.rows("GT-final_test.csv", ";"):
        name = row["Filename"]
        yield LabeledImage("test", f"{int(row['ClassId']):05d}", name, files.bytes(f"Images/{name}"))


def patch_camelyon(files: Files) -> Iterator[LabeledImage]:
    """PatchCamelyon: HDF5 files ``camelyonpatch_level_2_split_train_x.h5`` and ``..._y.h5``; validation images train."""
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{files.origin}: PatchCamelyon needs the package h5py; install it with `pip install h5py`"
        ) from None

    for split, parts in (("train", ("train", "valid")), ("test", ("test",))):
        for part in parts:
            stem = f"camelyonpatch_level_2_split_{part}"
            with (
                h5py.File(io.BytesIO(files.bytes(f"{stem}_x.h5"))) as images,
                h5py.File(io.BytesIO(files.bytes(f"{stem}_y.h5"))) as labels,
            ):
                for i, pixels in enumerate(images["x"]):
                    label = "tumor" if int(np.ravel(labels["y"][i])[0]) else "normal"
                    yield LabeledImage(split, label, f"{part}-{i:06d}.png", _png(pixels))  # type: ignore[arg-type]


def ucf101(files: Files) -> Iterator[LabeledImage]:
    """UCF-101: the middle frame of each video as an image ``<class>/<video>.jpg``, and the first split's lists."""
    for split, part in (("train", "trainlist01.txt"), ("test", "testlist01.txt")):
        for line in files.lines(part):
            name = f"{PurePosixPath(line.split()[0]).with_suffix('')}.jpg"
            yield LabeledImage(split, PurePosixPath(name).parts[0], name, files.bytes(name))  # type: ignore[arg-type]


def hateful_memes(files: Files) -> Iterator[LabeledImage]:
    """Hateful Memes: ``train.jsonl`` trains; ``dev_seen.jsonl`` (or ``dev.jsonl``) is the test, as in CLIP's suite."""
    dev = "dev_seen.jsonl" if files.has("dev_seen.jsonl") else "dev.jsonl"
    for split, part in (("train", "train.jsonl"), ("test", dev)):
        for line in files.lines(part):
            row = json.loads(line)
            label = ("benign", "hateful")[int(row["label"])]
            yield LabeledImage(split, label, row["img"], files.bytes(row["img"]))  # type: ignore[arg-type]


_CALTECH_TRAIN = 30
FER_CLASSES = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class _PlainUnpickler(pickle.Unpickler):
    """Reads the arrays, lists and strings of CIFAR's files, and refuses everything else."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _plain_pickle(data: bytes) -> dict[bytes, Any]:
    try:
        found: dict[bytes, Any] = _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        raise UserError(f"a file of CIFAR cannot be read safely ({error}); copy the Python version again") from None
    return found


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def _idx(data: bytes) -> np.ndarray:
    """Return the array of an idx file of bytes."""
    zero, kind, dimensions = struct.unpack(">HBB", data[:4])
    if zero or kind != 8:
        raise UserError("an idx file of MNIST does not hold bytes; copy it again")
    shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _records(value: Any) -> list[dict[str, Any]]:
    """Return MATLAB's array of structures as a list; SciPy returns a single one as a dictionary."""
    return [value] if isinstance(value, dict) else list(value)


#: Reader of each layout; the metrics are in :mod:`esvit_core.config.evaluation_settings`.
READERS: dict[str, Reader] = {
    "food101": food101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "sun397": sun397,
    "stanford-cars": stanford_cars,
    "fgvc-aircraft": fgvc_aircraft,
    "voc2007": voc2007,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "flowers102": flowers102,
    "mnist": mnist,
    "fer2013": fer2013,
    "stl10": stl10,
    "gtsrb": gtsrb,
    "patch-camelyon": patch_camelyon,
    "ucf101": ucf101,
    "hateful-memes": hateful_memes,
}

"""Trees of well-known data sets and of people's disks in miniature: splits and classes, or unlabelled with a hint."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import DataConfig
from esvit_core.data.ingest.ingest_plan import plan_ingest
from esvit_core.data.ingest.layout import detect_layout
from esvit_core.data.ingest.sources import open_source
from esvit_core.errors import UserError

HINT = "data.labels"


@dataclass(frozen=True)
class Reading:
    """How a source is read: images by split, classes, labels by name, messages."""

    splits: dict[str, int]
    classes: list[str]
    labels: dict[str, str]
    left_out: set[str]
    messages: str


def read(place: Path, files: dict[str, str | None] | list[str], **settings: Any) -> Reading:
    """Make a tree of files and plan its preparation; no image is decoded."""
    contents = files if isinstance(files, dict) else dict.fromkeys(files)
    for name, text in contents.items():
        path = place / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "x")
    with open_source(str(place / "source")) as opened:
        plan = plan_ingest(opened.entries, "source", DataConfig(**settings), read=opened.read)
    labels = {c.entry.name: plan.classes[c.label] for c in plan.candidates if c.label >= 0}
    splits = dict(Counter(c.split for c in plan.candidates))
    return Reading(splits, plan.classes, labels, {entry.name for entry, _ in plan.skipped}, "\n".join(plan.messages))


def many(*folders: str, each: int = 10, suffix: str = ".jpg") -> list[str]:
    return [f"{folder}/{i:04d}{suffix}" for folder in folders for i in range(each)]


def test_imagenet(tmp_path):
    root = "ILSVRC/Data/CLS-LOC"
    files = many(f"{root}/train/n01440764", f"{root}/train/n01443537", suffix=".JPEG")
    files += many(f"{root}/val", f"{root}/test", suffix=".JPEG")
    files += ["ILSVRC/Annotations/CLS-LOC/val/0000.xml", "ILSVRC/ImageSets/CLS-LOC/train_cls.txt"]
    found = read(tmp_path / "a", files)
    assert found.classes == ["n01440764", "n01443537"]
    assert found.splits == {"train": 18, "val": 2, "test": 20}  # val and test have no labels
    assert "the 10 val images have no labels" in found.messages
    table = "ImageId,PredictionString\n" + "".join(
        f"{i:04d},n0144{['0764', '3537'][i % 2]} 1 2 3 4\n" for i in range(10)
    )
    found = read(tmp_path / "b", dict.fromkeys(files) | {f"{root}/val/LOC_val_solution.csv": table})
    assert found.splits == {"train": 20, "val": 10, "test": 10}
    assert found.labels[f"{root}/val/0003.JPEG"] == "n01443537" and "LOC_val_solution.csv" in found.messages
    found = read(tmp_path / "c", many("train/n1", "train/n2", "val/n1", "val/n2"))
    assert found.splits == {"train": 20, "val": 20} and found.classes == ["n1", "n2"]


def test_sun397(tmp_path):
    files = many("SUN397/a/abbey", "SUN397/a/apartment_building/outdoor", "SUN397/b/bakery/shop", "SUN397/z/zoo")
    found = read(tmp_path, [*files, "SUN397/ClassName.txt"])
    assert found.classes == ["abbey", "apartment_building/outdoor", "bakery/shop", "zoo"] and len(found.labels) == 40


def test_letters_that_are_classes_themselves(tmp_path):
    assert read(tmp_path, many("A", "B", "C")).classes == ["A", "B", "C"]


def test_stanford_cars(tmp_path):
    found = read(tmp_path, [*many("stanford_cars/cars_train", "stanford_cars/cars_test"), "stanford_cars/devkit/m.mat"])
    assert found.splits == {"train": 10, "val": 10} and found.classes == []
    assert "train from cars_train/" in found.messages and "no labels" in found.messages


@pytest.mark.parametrize("above", ["", "images/", "coco/images/"])
def test_coco(tmp_path, above):
    files = many(*(f"{above}{name}2017" for name in ("train", "val", "test", "unlabeled")))
    found = read(tmp_path, [*files, "annotations/instances_train2017.json"])
    assert found.splits == {"train": 20, "val": 10, "test": 10} and found.classes == []


def test_gtsrb(tmp_path):
    files: dict[str, str | None] = dict.fromkeys(
        many("GTSRB/Final_Training/Images/00000", "GTSRB/Final_Training/Images/00014", suffix=".ppm")
        + many("GTSRB/Final_Test/Images", suffix=".ppm")
    )
    files |= {"GTSRB/Readme.txt": None, "GTSRB/Final_Training/Images/00000/GT-00000.csv": None}
    found = read(tmp_path / "a", files)
    assert found.classes == ["00000", "00014"] and found.splits == {"train": 17, "val": 3, "test": 10}
    rows = "".join(f"{i:04d}.ppm;53;54;6;5;48;49;{14 * (i % 2)}\n" for i in range(10))
    table = {"GTSRB/Final_Test/Images/GT-final_test.csv": f"Filename;Width;Height;X;Y;X2;Y2;ClassId\n{rows}"}
    found = read(tmp_path / "b", files | table)
    assert found.splits == {"train": 20, "val": 10}
    assert found.labels["GTSRB/Final_Test/Images/0003.ppm"] == "00014"


def test_gtsrb_of_kaggle(tmp_path):
    table = "Width,ClassId,Path\n" + "".join(f"{30 + i},{i % 2},Test/{i:04d}.png\n" for i in range(10))
    files = dict.fromkeys([*many("Train/0", "Train/1", "Test", suffix=".png"), "Meta/0.png", "Meta/1.png"])
    found = read(tmp_path, files | {"Test.csv": table})
    assert found.classes == ["0", "1"] and found.splits == {"train": 20, "val": 10}
    assert found.labels["Test/0003.png"] == "1" and found.left_out == {"Meta/0.png", "Meta/1.png"}
    assert "left out: 2 images outside the folders of the splits (Meta/0.png, Meta/1.png)" in found.messages


@pytest.mark.parametrize("years", [["VOC2012"], ["VOC2007", "VOC2012"]])
def test_voc(tmp_path, years):
    files = [name for y in years for name in many(f"VOCdevkit/{y}/JPEGImages")]
    files += [name for y in years for name in many(f"VOCdevkit/{y}/SegmentationClass", suffix=".png")]
    files += [f"VOCdevkit/{y}/{name}" for y in years for name in ("Annotations/0001.xml", "ImageSets/Main/train.txt")]
    found = read(tmp_path, files, val_fraction=0.0)
    assert found.splits == {"train": 10 * len(years)} and found.classes == []
    assert len(found.left_out) == 10 * len(years) and "masks or labels" in found.messages


def test_pets(tmp_path):
    files = [f"images/{breed}_{i}.jpg" for breed in ("Abyssinian", "beagle") for i in range(10)]
    files += [f"annotations/trimaps/{breed}_{i}.png" for breed in ("Abyssinian", "beagle") for i in range(10)]
    found = read(tmp_path, [*files, "annotations/list.txt", "annotations/xmls/beagle_1.xml"], val_fraction=0.0)
    assert found.splits == {"train": 20} and found.classes == [] and len(found.left_out) == 20
    assert "no labels" in found.messages


def test_food_101(tmp_path):
    files = [
        *many("food-101/images/apple_pie", "food-101/images/sushi"),
        "food-101/meta/train.txt",
        "food-101/README.txt",
    ]
    assert read(tmp_path, files).classes == ["apple_pie", "sushi"]


def test_dtd(tmp_path):
    files = [*many("dtd/images/banded", "dtd/images/dotted"), "dtd/labels/train1.txt", "dtd/imdb/imdb.mat"]
    assert read(tmp_path, files).classes == ["banded", "dotted"]


def test_caltech_101(tmp_path):
    files = [*many("101_ObjectCategories/accordion", "101_ObjectCategories/yin_yang"), "Annotations/accordion/1.mat"]
    assert read(tmp_path, files).classes == ["accordion", "yin_yang"]


def test_tiny_imagenet(tmp_path):
    top = "tiny-imagenet-200"
    files: dict[str, str | None] = dict.fromkeys(
        many(f"{top}/train/n01443537/images", f"{top}/train/n01629819/images", f"{top}/test/images", suffix=".JPEG")
    )
    files |= {f"{top}/val/images/val_{i}.JPEG": None for i in range(10)}
    files |= {
        f"{top}/wnids.txt": "n01443537\nn01629819\n",
        f"{top}/train/n01443537/n01443537_boxes.txt": "0000.JPEG\t0\t1",
    }
    rows = "".join(f"val_{i}.JPEG\t{['n01443537', 'n01629819'][i % 2]}\t0\t32\t44\t62\n" for i in range(10))
    found = read(tmp_path, files | {f"{top}/val/val_annotations.txt": rows})
    assert found.classes == ["n01443537", "n01629819"] and found.splits == {"train": 20, "val": 10, "test": 10}
    assert found.labels[f"{top}/val/images/val_3.JPEG"] == "n01629819" and "val_annotations.txt" in found.messages


def test_places365(tmp_path):
    found = read(tmp_path, many("data_large/a/airfield", "data_large/b/bar", "val_large", "test_large"))
    assert found.classes == ["airfield", "bar"] and found.splits["test"] == 20


def test_intel_images(tmp_path):
    files = many("seg_train/seg_train/sea", "seg_train/seg_train/street", "seg_test/seg_test/sea", "seg_pred/seg_pred")
    found = read(tmp_path, files)
    assert found.classes == ["sea", "street"] and found.splits == {"train": 30, "val": 10}


def test_yolo(tmp_path):
    for top, files in {
        "a": ["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt", "labels/val/2.txt"],
        "b": ["train/images/1.jpg", "valid/images/2.jpg", "train/labels/1.txt", "valid/labels/2.txt"],
    }.items():
        found = read(tmp_path / top, [*files, "data.yaml"])
        assert found.splits == {"train": 1, "val": 1} and found.classes == []


def test_masks_beside_images(tmp_path):
    found = read(tmp_path / "a", many("train", "train_masks", "test", suffix=".png"))
    assert found.splits == {"train": 10, "val": 10} and len(found.left_out) == 10
    found = read(tmp_path / "b", many("images", "masks", suffix=".png"), val_fraction=0.0)
    assert found.splits == {"train": 10} and found.classes == []
    found = read(tmp_path / "c", many("with_mask", "without_mask"))
    assert found.classes == ["with_mask", "without_mask"] and not found.left_out


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("TRAIN", "Valid"),
        ("Training", "Testing"),
        ("train_set", "dev_set"),
        ("trainval", "test"),
        ("train2017", "val2017"),
        ("seg_train", "seg_test"),
        ("training_images", "eval_images"),
    ],
)
def test_split_folders_in_any_case_and_with_other_words(tmp_path, train, val):
    found = read(tmp_path, many(f"{train}/cat", f"{train}/dog", f"{val}/cat", f"{val}/dog"))
    assert found.splits == {"train": 20, "val": 20} and found.classes == ["cat", "dog"]


@pytest.mark.parametrize("extra", ["unlabeled", "Unlabelled", "extra"])
def test_unlabelled_images_are_trained_on_and_not_held_out(tmp_path, extra):
    found = read(tmp_path, many("train/cat", "train/dog", extra, each=20), val_fraction=0.5)
    assert found.classes == ["cat", "dog"] and sum(found.splits.values()) == 60 and 10 < found.splits["val"] < 30
    assert not any(name.startswith(extra) for name in found.labels)


def test_classes_with_the_words_of_splits_are_classes(tmp_path):
    names = ["test tube", "toy train", "train station"]
    assert read(tmp_path / "a", many(*names)).classes == names
    assert read(tmp_path / "b", many("bus", "car", "train")).classes == ["bus", "car", "train"]


@pytest.mark.parametrize("folders", [["val2017", "test2017"], ["test", "val"], ["cars_test_set"]])
def test_splits_without_training_images(tmp_path, folders):
    if len(folders) == 1:  # one folder is taken for what it holds
        assert read(tmp_path, many(*folders), val_fraction=0.0).splits == {"train": 10}
        return
    with pytest.raises(UserError, match=r"but no train/; .*data.splits=none"):
        read(tmp_path, many(*folders))


def test_a_train_folder_alone_is_split_deterministically(tmp_path):
    found = [read(tmp_path / name, many("train/cat", "train/dog", each=30)) for name in "ab"]
    assert found[0] == found[1] and 1 < found[0].splits["val"] < 20


@pytest.mark.parametrize(
    "folders",
    [
        ["2019", "2020", "2021"],
        ["2019/05", "2019/06", "2020/01"],
        ["2019-05-12", "2019-06-01 Wedding"],
        ["201905__", "202011__"],
        ["DCIM/100APPLE", "DCIM/101APPLE"],
        ["DCIM/Camera", "Pictures/Screenshots", "WhatsApp/Media"],
        [
            "Takeout/Google Photos/Photos from 2019",
            "Takeout/Google Photos/Photos from 2020",
            "Takeout/Google Photos/Rome",
        ],
    ],
)
def test_dates_and_folders_of_devices_are_not_classes(tmp_path, folders):
    found = read(tmp_path, many(*folders))
    assert found.classes == [] and "no labels: the folders are dates or folders of a device" in found.messages
    assert HINT in found.messages


def test_numbers_are_classes(tmp_path):
    assert read(tmp_path, many(*(str(i) for i in range(10)))).classes == [str(i) for i in range(10)]


def test_two_levels_of_classes(tmp_path):
    found = read(tmp_path / "a", many("animal/cat", "animal/dog", "vehicle/car", "vehicle/bus"))
    assert found.classes == ["bus", "car", "cat", "dog"] and "data.labels=depth:1" in found.messages
    found = read(tmp_path / "b", many("train/animal/cat", "train/animal/dog", "train/vehicle/car", "train/vehicle/bus"))
    assert found.classes == ["bus", "car", "cat", "dog"]
    found = read(tmp_path / "c", many("art/clock", "art/chair", "photo/clock", "photo/chair"))  # domains or classes?
    assert found.classes == [] and HINT in found.messages
    found = read(tmp_path / "d", many("cat/001", "cat/002", "dog/001", "dog/003"))  # numbers below a class
    assert found.classes == ["cat", "dog"]


def test_a_folder_for_each_image_is_no_class(tmp_path):
    found = read(tmp_path, [f"patient{i:03d}/x.jpg" for i in range(60)])
    assert found.classes == [] and HINT in found.messages


def test_splits_below_the_classes(tmp_path):
    folders = [
        "bottle/train/good",
        "bottle/test/broken",
        "cable/train/good",
        "cable/test/bent",
        "bottle/ground_truth/broken",
    ]
    found = read(tmp_path, many(*folders, suffix=".png"))
    assert found.classes == ["bottle", "cable"] and found.splits == {"train": 20, "val": 20}
    assert len(found.left_out) == 10


def test_a_flat_folder_says_that_it_has_no_labels(tmp_path):
    assert "no labels" in read(tmp_path, ["1.jpg", "2.jpg"]).messages


TWO = many("animal/cat", "animal/dog", "vehicle/car", "vehicle/bus")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ("none", []),
        ("depth:1", ["animal", "vehicle"]),
        ("depth:2", ["bus", "car", "cat", "dog"]),
        ("folder", ["bus", "car", "cat", "dog"]),
    ],
)
def test_labels_as_set(tmp_path, labels, classes):
    assert read(tmp_path, TWO, labels=labels).classes == classes


@pytest.mark.parametrize(
    "table",
    [
        "file,label,split\n1.jpg,cat,train\n2.jpg,dog,train\n3.jpg,cat,test\n",
        "split\timage\tclass\ntrain\timages/1.jpg\tcat\ntrain\timages/2.jpg\tdog\ntest\timages/3.jpg\tcat\n",
        "id;species;width;set\n1;cat;3;Train\n2;dog;4;training\n3;cat;5;valid\n",
    ],
)
def test_labels_and_splits_from_a_table(tmp_path, table):
    files = {f"images/{i}.jpg": None for i in (1, 2, 3)}
    found = read(tmp_path, files | {"table.csv": table}, labels="csv")
    assert found.labels == {"images/1.jpg": "cat", "images/2.jpg": "dog", "images/3.jpg": "cat"}
    assert found.splits == {"train": 2, "val": 1} and "labels: table.csv" in found.messages


def test_a_missing_table_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"data.labels is csv, but no \.csv"):
        read(tmp_path, {"1.jpg": None, "readme.txt": "three words here"}, labels="csv")


def test_splits_as_set(tmp_path):
    folds = many("fold_0/a", "fold_1/a", "fold_2/b", "other")
    found = read(tmp_path, folds, splits={"fold_0": "val", "fold_*": "train"})
    assert found.splits == {"val": 10, "train": 20} and found.classes == ["a", "b"] and len(found.left_out) == 10
    found = read(tmp_path / "b", many("train/a", "train/b", "test/a", "test/b", each=30), splits="none")
    assert sum(found.splits.values()) == 120 and found.classes == ["a", "b"] and 2 < found.splits["val"] < 40
    with pytest.raises(UserError, match=r"data.splits matches none of its folders; it has fold_0"):
        read(tmp_path, folds, splits={"validation": "val"})


def test_the_messages_do_not_repeat_files_that_are_in_order():
    layout = detect_layout(["train/a/1.jpg", "val/a/2.jpg"], "source")
    assert layout.messages == ["splits: train from train/, val from val/", "labels: one folder per class"]

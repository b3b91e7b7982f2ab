"""Each transfer set of the paper, in miniature and as it is distributed, from its files to the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_sets import SETS, voc2007
from torch import nn

from esvit_core.config import Config, TransferSet
from esvit_core.config.evaluation_settings import PUBLISHED_METRICS
from esvit_core.data.ingest.published_sets import READERS, VOC_CLASSES
from esvit_core.data.ingest.transfer_set import arrange, prepare_transfer_set
from esvit_core.errors import UserError
from esvit_core.evaluation.transfer import evaluate_task, transfer_task

CONFIG = Config.from_mapping({"evaluation": {"resize": 24, "crop": 24, "batch_size": 8}})


class MeanColor(nn.Module):
    """A network whose feature is the mean color of the image, which tells the made classes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def view_and_last_blocks(self, x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        color = x.mean((2, 3))
        return color, color


def write(tree: dict[str, bytes], folder: Path) -> Path:
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_every_set_of_the_paper_has_a_reader_a_metric_and_a_miniature() -> None:
    assert len(READERS) == 18
    assert READERS.keys() == PUBLISHED_METRICS.keys() == SETS.keys()


@pytest.mark.parametrize("name", SETS)
def test_a_set_as_it_is_distributed_is_prepared_and_measured(name: str, store: Any, tmp_path: Path) -> None:
    if name == "patch-camelyon":
        pytest.importorskip("h5py", reason="PatchCamelyon is distributed as HDF5; h5py is not installed")
    make, train, test = SETS[name]
    source = write(make(), tmp_path / "set")
    chosen = TransferSet(name="small", source=f"{name}:{source}")
    assert (chosen.layout, chosen.source, chosen.metric) == (name, str(source), PUBLISHED_METRICS[name])
    run = store.uri("runs/a")
    manifest = prepare_transfer_set(chosen, store, f"{run}/transfer/small", CONFIG.data)
    assert (manifest.splits["train"].samples, manifest.splits["val"].samples) == (train, test)
    assert len(manifest.classes) == (0 if name == "voc2007" else 2)
    assert prepare_transfer_set(chosen, store, f"{run}/transfer/small", CONFIG.data) == manifest
    network = MeanColor().eval()
    task = transfer_task(run, store, CONFIG, "small", {"trained": network, "baseline": network})
    result = evaluate_task(task, chosen, seed=0)
    # The classes have different colors, so a wrong label or split would show.
    assert result["status"] == "measured" and result["results"]["trained"]["transfer/small"] == pytest.approx(100)
    assert result["samples"] == {"train": train, "val": test}


def test_a_class_with_only_difficult_objects_is_ignored(tmp_path: Path) -> None:
    labels = arrange("voc2007", str(write(voc2007(), tmp_path / "set")), tmp_path / "out")["labels"]
    columns = [VOC_CLASSES.index(name) for name in ("dog", "cat", "car")]
    assert np.array(labels["000000.jpg"])[columns].tolist() == [1, -1, 0]
    assert np.array(labels["000001.jpg"])[columns].tolist() == [-1, 1, -1]
    assert np.array(labels["000002.jpg"])[columns].tolist() == [1, -1, 1]


def test_a_missing_list_is_one_line(tmp_path: Path) -> None:
    source = write({"images/a.jpg": b""}, tmp_path / "set")
    with pytest.raises(UserError, match=r"^food101 .*: expected a file meta/train.json, but it is not there; unpack"):
        arrange("food101", str(source), tmp_path / "out")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    source = write({"batches.meta": b"cos\nsystem\n(S'true'\ntR."}, tmp_path / "set")
    with pytest.raises(UserError, match=r"cannot be read safely \(it names os.system\)"):
        arrange("cifar10", str(source), tmp_path / "out")


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout: expected one of food101"):
        TransferSet(name="a", source="x", layout="imagenet")
    assert TransferSet(name="a", source="s3://bucket/food101").layout is None


def test_several_labels_need_a_metric_of_rankings(store: Any, tmp_path: Path) -> None:
    chosen = TransferSet(name="small", source=f"voc2007:{write(voc2007(), tmp_path / 'set')}", metric="accuracy")
    run = store.uri("runs/a")
    prepare_transfer_set(chosen, store, f"{run}/transfer/small", CONFIG.data)
    task = transfer_task(run, store, CONFIG, "small", {"trained": MeanColor().eval()})
    assert "use the metric map_11_point" in evaluate_task(task, chosen, seed=0)["reason"]

"""Prepare many small JPEGs from a folder, a tar and a zip: images per second, peak memory, and what a kill loses.

    python benchmarks/sources.py --images TAR [--count 60000]

TAR holds any images; each is shrunk to 32 x 32 pixels in ``count`` variants, as large as the JPEGs of CIFAR-10. For each
kind of source one preparation runs undisturbed, and another is killed (SIGKILL) when half of its shards are stored and
then repeated. The last line is JSON with ``rate`` (images/s), ``peak_mib`` (of the process that reads, without those that
decode) and ``reused`` (share of the stored shards that are not stored again) for each kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from data import BUCKET, in_process
from machine import describe, peak_memory, reset_peak_memory

from esvit_core.config import DataConfig
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.shards.reader import decode_image
from esvit_core.storage import ObjectStore
from esvit_core.storage.session import open_store

CONFIG = DataConfig(shard_mib=4)
_CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="TAR")
    parser.add_argument("--count", type=int, default=60_000)
    arguments = parser.parse_args()
    print(describe(_CPU), flush=True)
    figures = {}
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "store") as store:
        assert store is not None
        store.ensure_bucket(BUCKET)
        for kind, source in sources(arguments.images, arguments.count, Path(folder)).items():
            work = partial(measure, source, store)
            rate, peak, count, content = in_process(store, work, 2)
            reused = killed(source, store, count, content)
            figures[kind] = {"rate": round(rate), "peak_mib": round(peak / 2**20), "reused": reused}
            print(f"{kind}: {figures[kind]}", flush=True)
    print(json.dumps(figures))


def sources(images: str, count: int, folder: Path) -> dict[str, str]:
    """Write the JPEGs as a folder with ten classes, a tar and a zip."""
    images_folder = folder / "folder"
    for name, data in jpegs(images, count):
        path = images_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    shutil.make_archive(str(folder / "all"), "tar", images_folder)
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        for path in sorted(images_folder.rglob("*.jpg")):
            archive.write(path, path.relative_to(images_folder))
    return {"folder": str(images_folder), "tar": str(folder / "all.tar"), "zip": str(folder / "all.zip")}


def jpegs(images: str, count: int) -> Iterator[tuple[str, bytes]]:
    rng = np.random.default_rng(0)
    with open_source(images) as opened:
        decoded = [decode_image(opened.read(entry)) for entry, _ in zip(opened.entries, range(200), strict=False)]
    for number in range(count):
        image = decoded[number % len(decoded)]
        top, left = (int(rng.integers(0, side - 31)) for side in image.shape[:2])
        crop = np.ascontiguousarray(image[top : top + 32, left : left + 32])
        yield f"{number % 10}/{number:06d}.jpg", simplejpeg.encode_jpeg(crop, quality=90)


def measure(source: str, store: ObjectStore, destination: str) -> tuple[float, int, int, str]:
    """Return images per second, the peak of the memory of this process in bytes, and number of shards and fingerprint."""
    reset_peak_memory(_CPU)
    start = time.monotonic()
    manifest = prepare(source, store, destination, CONFIG)
    rate = manifest.samples / (time.monotonic() - start)
    return rate, int(peak_memory(_CPU)), manifest.shard_count, manifest.fingerprint


def killed(source: str, store: ObjectStore, count: int, fingerprint: str) -> float:
    """Kill a preparation when half of its shards are stored; return the share of them that the next one keeps.

    Args:
        count, fingerprint: number of shards and fingerprint of the undisturbed preparation.
    """
    destination = f"s3://{BUCKET}/killed"
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(source, store, destination, CONFIG))
    process.start()
    while len(shards(store, destination)) < count // 2 and process.is_alive():
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = shards(store, destination)
    assert before and not store.exists(f"{destination}/manifest.json")
    resumed = prepare(source, store, destination, CONFIG)
    assert (resumed.fingerprint, resumed.shard_count) == (fingerprint, count)
    after = shards(store, destination)
    store.remove_prefix(destination)
    return round(sum(after.get(name) == time for name, time in before.items()) / len(before), 3)


def shards(store: ObjectStore, destination: str) -> dict[str, object]:
    """Return the times at which the stored shards were written, by name."""
    return {found.uri: found.modified for found in store.list(f"{destination}/shards")}


if __name__ == "__main__":
    main()

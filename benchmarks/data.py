"""Measure the preparation and the loading of data, as ratios within one run.

    python benchmarks/data.py --images TAR [--limit 12000] [--counts 10000 400000] [--rounds 3]

TAR holds JPEG photographs. If there are fewer than --limit, each is used several times, with a comment that makes it another
file. With few, the start of the processes and the last upload count for much. Needs two cores and Linux. The last line is JSON:

- crops: decoding and crops of our pipeline, without photometrics, against the whole published pipeline (PIL and torchvision),
  images per second of processor time of one thread. cpu_photometrics: the same with photometrics.
- prepare_cores: preparation of the photographs, with the server that stores them, on two cores against one, images per
  second.
- prepare_s3: preparation from a prefix in the object store, each request of which takes 30 ms longer, against the folder.
- train_s3: batches of the training loader with an empty cache and 30 ms longer requests, against a full cache.
- restart_reuse: share of the uploaded shards that a preparation reuses after another was killed at a random moment.
- memory_growth: peak memory of the preparation of the second of --counts images against the first.
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from augment import ours, plain, read
from machine import describe, peak_memory, reset_peak_memory
from PIL import Image

from esvit_core.config import AugmentConfig, Config, DataConfig
from esvit_core.data.ingest.part_records import PartRecords
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.ingest.sources import open_source
from esvit_core.data.loading.loader import TrainLoader
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.storage import ObjectStore
from esvit_core.storage.connection import Connection
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.storage.session import open_store

LATENCY = 0.03  # seconds
BUCKET = "benchmark"
_CPU = torch.device("cpu")
_JPEG = b"\xff\xd8"  # start of image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, metavar="TAR")
    parser.add_argument("--limit", type=int, default=12_000, help="photographs that are used")
    parser.add_argument("--counts", type=int, nargs=2, default=[10_000, 400_000], help="tiny images for memory_growth")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe(_CPU), flush=True)
    figures: dict[str, float] = {}
    figures |= rates_of_crops(read(arguments.images, 64), arguments.rounds)
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "store") as store:
        assert store is not None
        store.ensure_bucket(BUCKET)
        work = Path(folder)
        source = unpack(arguments.images, work / "photographs", arguments.limit)
        figures["prepare_cores"] = best_ratio(
            lambda: rate(store, str(source), cores=2), lambda: rate(store, str(source), cores=1), arguments.rounds
        )
        prefix = upload(store, source)
        figures["prepare_s3"] = best_ratio(
            lambda: rate(store, prefix, latency=LATENCY), lambda: rate(store, str(source)), arguments.rounds
        )
        figures["train_s3"] = train_ratio(store, str(source), work, arguments.rounds)
        figures["restart_reuse"] = restart_reuse(store, str(source))
        peaks = [peak_of(store, tiny_images(work / f"{count}.tar", count)) for count in arguments.counts]
        print(f"peak memory: {', '.join(f'{peak / 2**20:.0f} MiB' for peak in peaks)}", flush=True)
        figures["memory_growth"] = peaks[1] / peaks[0]
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def rates_of_crops(encoded: list[bytes], rounds: int) -> dict[str, float]:
    """Compare our pipeline, without and with photometrics, with the published one."""
    config = Config.load("imagenet_swin_tiny_w7").augment
    off = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": 0.0}
    bare = AugmentConfig.model_validate(config.model_dump() | off)
    paths = {"crops": ours(bare), "cpu_photometrics": ours(config), "published": plain(config)}
    best = dict.fromkeys(paths, 0.0)
    for _ in range(rounds):
        for name, path in paths.items():
            start = time.process_time()
            for number, data in enumerate(encoded):
                path(data, number)
            best[name] = max(best[name], len(encoded) / (time.process_time() - start))
    print("crops, images/s of a core: " + ", ".join(f"{name} {value:.0f}" for name, value in best.items()), flush=True)
    return {name: best[name] / best["published"] for name in ("crops", "cpu_photometrics")}


def best_ratio(one: Callable[[], float], other: Callable[[], float], rounds: int) -> float:
    """Return the ratio of the highest rates of two measurements that take turns."""
    pairs = [(one(), other()) for _ in range(rounds)]
    best = max(first for first, _ in pairs), max(second for _, second in pairs)
    print(f"{best[0]:.0f} against {best[1]:.0f} images/s", flush=True)
    return best[0] / best[1]


def rate(store: ObjectStore, source: str, cores: int = 2, latency: float = 0.0) -> float:
    """Return the images per second of a preparation in a process of its own."""

    def measured(destination: str) -> float:
        with slow_requests(latency):
            start = time.perf_counter()
            manifest = prepare(source, store, destination, DataConfig(processes=cores if cores > 1 else 0))
            return manifest.samples / (time.perf_counter() - start)

    return float(in_process(store, measured, cores))


def train_ratio(store: ObjectStore, source: str, work: Path, rounds: int) -> float:
    """Return the rate of the training loader with an empty cache and slow requests against that with a full cache."""

    def measured(destination: str) -> list[float]:
        prepare(source, store, destination, DataConfig(shard_mib=8))
        values = {"training": {"batch_size": 32, "workers": 2}}
        config = Config.from_mapping({**Config.load("imagenet_swin_tiny_w7").model_dump(mode="json"), **values})
        best = [0.0, 0.0]
        for number in range(rounds):
            for i, latency in enumerate((LATENCY, 0.0)):  # the second time, the cache is full
                with slow_requests(latency):
                    dataset = ShardDataset(store, destination, "train", work / f"cache-{number}")
                    loader = TrainLoader(dataset, config, seed=0)
                    start = time.perf_counter()
                    batches = sum(1 for _ in loader.epoch(0))
                    best[i] = max(best[i], 32 * batches / (time.perf_counter() - start))
        return best

    slow, local = in_process(store, measured, 2)
    print(f"loader: {slow:.0f} against {local:.0f} images/s", flush=True)
    return float(slow / local)


def restart_reuse(store: ObjectStore, source: str) -> float:
    """Kill a preparation at a random moment, and return the share of its uploaded shards that the next one reuses."""
    config = DataConfig(shard_mib=1)

    def undisturbed(destination: str) -> int:
        return prepare(source, store, destination, config).shard_count

    def uploaded() -> int:
        return sum("/shards/" in found.uri for found in store.list(destination))

    shards = in_process(store, undisturbed, 2)
    wanted = random.randrange(1, max(2, shards - 1))
    destination = f"s3://{BUCKET}/killed"
    process = multiprocessing.get_context("fork").Process(target=prepare, args=(source, store, destination, config))
    process.start()
    while uploaded() < wanted and process.is_alive():
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    there = uploaded()
    reused: list[int] = []
    count = PartRecords.count_shards

    def counted(records: PartRecords) -> int:
        reused.append(count(records))
        return reused[-1]

    PartRecords.count_shards = counted  # type: ignore[method-assign]
    prepare(source, store, destination, config)
    PartRecords.count_shards = count  # type: ignore[method-assign]
    store.remove_prefix(destination)
    if not reused:
        raise SystemExit("the preparation ended before it could be killed; more photographs are needed")
    print(f"{reused[0]} of {there} uploaded shards reused", flush=True)
    return reused[0] / there


def peak_of(store: ObjectStore, source: str) -> int:
    """Return the peak memory of a preparation, bytes."""

    def measured(destination: str) -> int:
        reset_peak_memory(_CPU)
        prepare(source, store, destination, DataConfig(processes=0))
        return peak_memory(_CPU)

    return int(in_process(store, measured, 2))


def in_process(store: ObjectStore, work: Callable[[str], Any], cores: int) -> Any:
    """Return the result of ``work(destination)`` in a process of its own, with so many cores; remove what it stored."""
    context = multiprocessing.get_context("fork")
    gc.freeze()  # what PyTorch has allocated, which a preparation does not import
    results = context.SimpleQueue()
    destination = f"s3://{BUCKET}/{random.getrandbits(64):016x}"

    process = context.Process(target=lambda: results.put(work(destination)))
    with limited_to(cores, store):
        process.start()
        process.join()
    if process.exitcode:
        raise SystemExit(f"a measurement failed with exit code {process.exitcode}")
    store.remove_prefix(destination)
    return results.get()


@contextmanager
def limited_to(cores: int, store: ObjectStore) -> Iterator[None]:
    """Let this process, those that it starts and the store's server use so many cores together."""
    assert store.address.directory is not None
    server = EmbeddedStore(store.address.directory).status()
    assert server is not None
    threads = [0, *(int(task.name) for task in Path(f"/proc/{server.pid}/task").iterdir())]
    before = os.sched_getaffinity(0)
    try:
        for thread in threads:
            os.sched_setaffinity(thread, sorted(before)[:cores])
        yield
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, before)


@contextmanager
def slow_requests(seconds: float) -> Iterator[None]:
    """Let every request to the object store take longer."""
    call = Connection.call

    def slow(self: Connection, *arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return call(self, *arguments, **named)

    if seconds:
        Connection.call = slow  # type: ignore[method-assign]
    try:
        yield
    finally:
        Connection.call = call  # type: ignore[method-assign]


def unpack(source: str, folder: Path, count: int) -> Path:
    """Write so many JPEGs to a folder; each has a comment of its own."""
    folder.mkdir()
    with open_source(source) as opened:
        for number, entry in zip(range(count), itertools.cycle(opened.entries), strict=False):
            data = opened.read(entry)
            if not data.startswith(_JPEG):
                raise SystemExit(f"error: {source}: {entry.name} is not a JPEG file")
            comment = b"copy %08d" % (number // len(opened.entries))
            head = _JPEG + b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big")
            (folder / f"{number:06d}.jpg").write_bytes(head + comment + data[len(_JPEG) :])
    return folder


def upload(store: ObjectStore, folder: Path) -> str:
    prefix = f"s3://{BUCKET}/photographs"
    for path in sorted(folder.iterdir()):
        store.put_bytes(f"{prefix}/{path.name}", path.read_bytes())
    return prefix


def tiny_images(path: Path, count: int) -> str:
    """Write a tar of different images of 8 x 8 pixels."""
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536)).save(content, "PNG")
            entry = tarfile.TarInfo(f"{number // 1000:04d}/{number:07d}.png")
            entry.size = content.tell()
            content.seek(0)
            tar.addfile(entry, content)
    return str(path)


if __name__ == "__main__":
    main()

"""Preparation in parts: by several processes, after a kill, on top of earlier data, and with duplicates across parts."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_data import names_of_objects, shards_below

from esvit_core.config import DataConfig
from esvit_core.data.ingest import parts, prepare_part, thread_heaps
from esvit_core.data.ingest import prepare as prepare_module
from esvit_core.data.ingest.entries import Entry
from esvit_core.data.ingest.ingest_plan import Candidate
from esvit_core.data.ingest.parts import Share, divide
from esvit_core.data.ingest.prepare import prepare, prepare_share
from esvit_core.data.shards import index_pages
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.storage import IntegrityError

CONFIG = DataConfig(val_fraction=0.3, shard_mib=0.01, max_bad_fraction=0.5)


@pytest.fixture
def source(folder, make) -> Path:
    """Three classes of six images, and two files that are not images."""
    return make.folder(folder, {"class0/bad.png": b"no image", "class2/bad.png": b"nor this"})


@pytest.fixture
def small_parts(monkeypatch) -> int:
    """Parts of four files."""
    monkeypatch.setattr(parts, "PART_FILES", 4)
    return 4


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files that are read."""
    names: list[str] = []
    load = prepare_part.load
    monkeypatch.setattr(prepare_part, "load", lambda job, x: (names.append(x.entry.name), load(job, x))[1])
    return names


def images(store, at: str) -> dict[str, list[tuple[str, int, bytes]]]:
    """Return name, class and content of every image, by split, in order."""
    found = {}
    for split in Manifest.read(store, store.uri(at)).splits:
        data = ShardDataset(store, store.uri(at), split)
        found[split] = [(data.name(i), data.label(i), data.encoded(i)) for i in range(len(data))]
        assert [label for _, label, _ in found[split]] == data.labels.tolist()
    return found


def names_below(store, at: str) -> set[str]:
    return {stat.uri.removeprefix(store.uri(f"{at}/")) for stat in store.list(store.uri(at))}


def candidates(counts: dict[str, int]) -> list[Candidate]:
    entry = Entry("x", 1, "", None)
    return [Candidate(entry, split, -1) for split, count in sorted(counts.items()) for _ in range(count)]  # type: ignore[arg-type]


@given(st.dictionaries(st.sampled_from(["test", "train", "val"]), st.integers(0, 40)), st.integers(1, 9))
def test_every_candidate_is_in_one_part_of_its_split(counts, count):
    before, parts.PART_FILES = parts.PART_FILES, 7
    try:
        planned = divide(candidates(counts), {"train": 5})
    finally:
        parts.PART_FILES = before
    assert [i for part in planned for i in range(part.start, part.stop)] == [*range(sum(counts.values()))]
    for split, first in (("train", 5), ("val", 0)):
        numbers = [part.number for part in planned if part.split == split]
        assert numbers == [*range(first, first + -(-counts.get(split, 0) // 7))]
    shares = [Share(number, count).of(planned) for number in range(1, count + 1)]
    assert sorted(part.start for share in shares for part in share) == [part.start for part in planned]


@pytest.mark.parametrize("text", ["", "2", "0/2", "3/2", "a/b", "1/"])
def test_a_share_is_written_as_two_numbers(text):
    assert Share.parse("2/4") == Share(2, 4) and str(Share(2, 4)) == "2/4"
    with pytest.raises(ValueError):
        Share.parse(text)


def test_parts_hold_the_same_images_in_the_same_order(store, prepared, source, monkeypatch):
    whole = prepared(source, at="whole", **CONFIG.model_dump())
    monkeypatch.setattr(parts, "PART_FILES", 4)
    divided = prepared(source, at="divided", **CONFIG.model_dump())
    assert len(list(whole.parts)) == 2 and len(list(divided.parts)) > 4
    assert images(store, "divided") == images(store, "whole")
    assert names_below(store, "divided") == names_of_objects(store, store.uri("divided"))
    assert divided.classes == whole.classes and divided.bad.count == whole.bad.count == 2
    assert [split.per_class for split in divided.splits.values()] == [s.per_class for s in whole.splits.values()]


def _share(store, source: str, share: Share) -> None:
    parts.PART_FILES = 4
    prepare_share(source, store, store.uri("data"), CONFIG, share)


def test_shares_in_several_processes_give_what_one_preparation_gives(store, source, small_parts, reads, capsys):
    context = multiprocessing.get_context("fork")
    shares = [context.Process(target=_share, args=(store, str(source), Share(n, 3))) for n in (1, 2, 3)]
    for process in shares:
        process.start()
    for process in shares:
        process.join(60)
        assert process.exitcode == 0
    assert not store.exists(store.uri("data/manifest.json"))
    merged = prepare(str(source), store, store.uri("data"), CONFIG)
    assert reads == [] and "resuming with" in capsys.readouterr().out
    assert merged == prepare(str(source), store, store.uri("alone"), CONFIG)
    assert names_below(store, "data") == names_of_objects(store, store.uri("data"))
    _share(store, str(source), Share(1, 3))  # finds the data
    assert "already done" in capsys.readouterr().out


def test_a_share_that_died_is_done_by_whoever_comes_next(store, source, small_parts, reads):
    _share(store, str(source), Share(1, 2))
    of_first = len(reads)
    assert 0 < of_first < 20
    assert prepare(str(source), store, store.uri("data"), CONFIG).samples == 18
    assert len(reads) == 20


def _killed(store, source: str, puts: int) -> None:
    count = 0
    put = type(store).put_bytes

    def counted(self, *arguments, **named):
        nonlocal count
        count += 1
        if count == puts:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(self, *arguments, **named)

    type(store).put_bytes = counted
    prepare(source, store, store.uri("data"), CONFIG)


@pytest.mark.parametrize("puts", [3, 8, 14, 19])
def test_a_killed_preparation_resumes_with_its_parts(store, source, small_parts, reads, puts):
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(store, str(source), puts))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    finished = sum(name.startswith("unfinished/") and name.endswith(".json") for name in names_below(store, "data"))
    resumed = prepare(str(source), store, store.uri("data"), CONFIG)
    assert len(reads) <= 20 - small_parts * finished + small_parts
    assert resumed == prepare(str(source), store, store.uri("alone"), CONFIG)
    assert names_below(store, "data") == names_of_objects(store, store.uri("data"))


def test_only_the_part_of_an_edited_file_is_prepared_again(store, source, small_parts, reads, monkeypatch, capsys):
    monkeypatch.setattr("esvit_core.data.ingest.fingerprint.SAMPLE", 0)  # as in a large source
    _share(store, str(source), Share(1, 1))
    reads.clear()
    edited = source / "class1" / "3.png"
    data = bytearray(edited.read_bytes())
    data[-1] ^= 1  # the same image in a different file
    edited.write_bytes(data)
    os.utime(edited, (1_000, 1_000))
    prepare(str(source), store, store.uri("data"), CONFIG)
    assert "class1/3.png" in reads and len(reads) <= small_parts
    assert "starting over" in capsys.readouterr().out
    assert images(store, "data") == images_of_fresh(store, source)


def images_of_fresh(store, source) -> dict[str, list[tuple[str, int, bytes]]]:
    prepare(str(source), store, store.uri("fresh"), CONFIG)
    return images(store, "fresh")


def test_a_damaged_object_of_a_finished_part_is_made_again(store, source, small_parts, reads):
    _share(store, str(source), Share(1, 1))
    reads.clear()
    listing = min(name for name in names_below(store, "data") if name.startswith("files/"))
    size = store.stat(store.uri(f"data/{listing}")).size
    store.put_bytes(store.uri(f"data/{listing}"), bytes(size))
    store.remove(store.uri(f"data/{max(n for n in names_below(store, 'data') if n.startswith('shards/'))}"))
    prepare(str(source), store, store.uri("data"), CONFIG)
    assert 0 < len(reads) <= 2 * small_parts
    assert images(store, "data") == images_of_fresh(store, source)


def test_duplicates_in_other_parts_are_dropped_and_copies_of_training_images_are_not_held_out(
    store, tmp_path, make, small_parts
):
    folder = make.folder(tmp_path / "x", {f"{i}.png": make.file(i % 10) for i in range(40)})
    config = DataConfig(val_fraction=0.5, shard_mib=0.01)
    kept = prepare(str(folder), store, store.uri("kept"), config)
    contents = {split: {data for *_, data in found} for split, found in images(store, "kept").items()}
    assert not contents["train"] & contents.get("val", set())
    assert kept.dropped > 0 and kept.samples + kept.dropped == 40
    assert kept.copies == kept.samples - sum(map(len, contents.values()))
    exact = config.model_copy(update={"drop_duplicates": "exact"})
    dropped = prepare(str(folder), store, store.uri("dropped"), exact)
    assert dropped.samples == 10 and dropped.dropped == 30 and dropped.copies == 0
    assert len({data for found in images(store, "dropped").values() for *_, data in found}) == 10
    assert names_below(store, "dropped") == names_of_objects(store, store.uri("dropped"))


def test_earlier_parts_are_referred_to_unless_an_image_of_them_is_gone(store, source, make, small_parts, reads):
    first = prepare(str(source), store, store.uri("one"), CONFIG)
    reads.clear()
    gone = images(store, "one")["train"][0][0]
    (source / gone).unlink()
    make.folder(source, {f"class{i}/new{j}.png": make.file(900 + 10 * i + j) for i in range(3) for j in range(3)})
    second = prepare(str(source), store, store.uri("two"), CONFIG, base=store.uri("one"))
    assert len(reads) == 9 and all("new" in name for name in reads)
    references = {part.located_in(store.uri("one")).name for part in first.parts}
    shared = {part.name for part in second.parts} & references
    assert len(shared) == len(references) - 1
    found = {name for split in images(store, "two").values() for name, *_ in split}
    assert gone not in found and len(found) == 18 - 1 + 9 == second.samples
    # The shards of the part that was written anew are still those of the earlier data.
    assert all("/two/" not in uri or "new" in "".join(reads) for uri, _ in shards_below(store, store.uri("two")))
    old = {uri for uri, _ in shards_below(store, store.uri("one"))}
    assert {uri for uri, _ in shards_below(store, store.uri("two")) if "/one/" in uri} <= old
    third = prepare(str(source), store, store.uri("three"), CONFIG, base=store.uri("two"))
    assert images(store, "three") == images(store, "two") and third.fingerprint == second.fingerprint


def test_few_pages_of_the_index_are_in_memory(store, source, small_parts, monkeypatch, tmp_path):
    manifest = prepare(str(source), store, store.uri("data"), CONFIG)
    assert len(manifest.splits["train"].parts) > 2
    expected = images(store, "data")["train"]
    monkeypatch.setattr(index_pages, "_IN_MEMORY", 2)
    data = ShardDataset(store, store.uri("data"), "train", tmp_path / "cache")
    for dataset in (data, pickle.loads(pickle.dumps(data))):
        assert [dataset.name(i) for i in range(len(dataset))] == [name for name, *_ in expected]
        assert [dataset.encoded(i) for i in reversed(range(len(dataset)))] == [data for *_, data in reversed(expected)]
        assert len(dataset._pages._pages) == 2
    assert [data.shard(number)[1].samples for number in range(len(data.shard_sizes))] == data.shard_sizes
    with pytest.raises(IndexError):
        data.label(len(data))


def test_a_part_that_does_not_match_the_manifest_is_an_error(store, source, small_parts):
    manifest = prepare(str(source), store, store.uri("data"), CONFIG)
    one, other, *rest = manifest.splits["train"].parts
    swapped = [one.model_copy(update={"shard_samples": [*one.shard_samples, 1]}), other, *rest]
    train = manifest.splits["train"].model_copy(update={"parts": swapped})
    changed = manifest.model_copy(update={"splits": {**manifest.splits, "train": train}})
    store.put_json(store.uri("data/manifest.json"), changed.model_dump(mode="json"))
    with pytest.raises(IntegrityError, match="does not match the manifest"):
        ShardDataset(store, store.uri("data"), "train").image(0)
    assert np.isfinite(ShardDataset(store, store.uri("data"), "val").image(0)).all()


OURS = ("esvit_core", "pydantic")  # what their code allocates; that of PIL and urllib3 varies


def test_a_finished_part_leaves_little_in_memory(store, make, tmp_path, monkeypatch):
    """Per file less than a tenth of its Entry, its Candidate and its File with their texts."""
    monkeypatch.setattr(parts, "PART_FILES", 60)
    files = {f"{i}.png": make.file(np.full((8, 8, 3), i % 256, np.uint8)) for i in range(480)}
    numbers, taken = itertools.count(1), list[int]()

    def prepared(*arguments):
        part = prepare_part.prepare_part(*arguments)
        if next(numbers) in (4, 8):
            arguments[0].uploads.finish()  # what is on its way is in memory
            gc.collect()
            ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"*/{n}/*") for n in OURS])
            taken.append(sum(trace.size for trace in ours.traces))
        return part

    monkeypatch.setattr(prepare_module, "prepare_part", prepared)
    source = make.folder(tmp_path / "x", files)
    tracemalloc.start()
    prepare(str(source), store, store.uri("data"), DataConfig(shard_mib=0.05, val_fraction=0))
    tracemalloc.stop()
    assert len(taken) == 2 and taken[1] - taken[0] < 240 * 200


def test_the_threads_of_a_preparation_share_a_heap():
    """With a heap for each thread, the memory of the process grows where Python's own does not."""
    thread_heaps.share_heap()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        pytest.skip("malloc_info is glibc's")
    before = _heaps(libc)
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (libc.malloc(100), barrier.wait(30))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _heaps(libc) == before


def _heaps(libc: ctypes.CDLL) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "info"
        libc.fopen.restype = ctypes.c_void_p
        stream = ctypes.c_void_p(libc.fopen(str(path).encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return path.read_text().count("<heap nr=")


def test_a_share_without_parts_ends_at_once(store, source, capsys):
    prepare_share(str(source), store, store.uri("data"), CONFIG, Share(9, 9))
    assert "share 9/9 is done: 0 of 2 parts" in capsys.readouterr().out

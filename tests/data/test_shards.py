"""Shards: deterministic bytes, limited size, WebDataset's naming, and a correct index."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from esvit_core.data.shards.format import INDEX_DTYPE, Sample, ShardWriter
from esvit_core.data.shards.manifest import Shard

samples = st.lists(
    st.builds(
        Sample,
        data=st.binary(min_size=1, max_size=3000),
        suffix=st.sampled_from(["jpg", "png"]),
        label=st.integers(-1, 3),
        name=st.text(max_size=20).filter(lambda s: s.isprintable()),
    ),
    max_size=25,
)


def write(directory: Path, samples: list[Sample], max_bytes: int) -> tuple[ShardWriter, dict[str, bytes]]:
    kept: dict[str, bytes] = {}

    def keep(shard: Shard, path: Path) -> None:
        kept[shard.name] = path.read_bytes()
        path.unlink()

    writer = ShardWriter("train", directory, max_bytes, keep)
    assert [writer.add(sample) for sample in samples] == list(range(len(samples)))
    writer.close()
    return writer, kept


@settings(max_examples=40)
@given(samples=samples, max_bytes=st.sampled_from([10_240, 20_480, 1 << 20]))
def test_samples_are_at_the_positions_of_the_index(tmp_path_factory, samples, max_bytes):
    directory = tmp_path_factory.mktemp("shards")
    writer, kept = write(directory, samples, max_bytes)
    index = writer.index()
    assert index.dtype == INDEX_DTYPE and len(index) == len(samples) == len(writer)
    for row, sample in zip(index, samples, strict=True):
        shard = kept[writer.shards[row["shard"]].name]
        assert shard[row["offset"] :][: row["bytes"]] == sample.data
        assert json.loads(shard[row["info_offset"] :][: row["info_bytes"]]) == {"name": sample.name}
        assert row["label"] == sample.label
    assert not list(directory.iterdir())  # nothing is left behind


@settings(max_examples=20)
@given(samples=samples)
def test_the_same_samples_give_the_same_bytes(tmp_path_factory, samples):
    first, kept = write(tmp_path_factory.mktemp("a"), samples, 20_480)
    second, again = write(tmp_path_factory.mktemp("b"), samples, 20_480)
    assert kept == again and first.shards == second.shards and np.array_equal(first.index(), second.index())


def test_only_a_single_large_sample_exceeds_the_size_limit_of_a_shard(tmp_path):
    sizes = [100, 9_000, 40_000, 5, 8_000, 8_000, 8_000]
    writer, kept = write(tmp_path, [Sample(bytes(size), "png", 0, "x") for size in sizes], 20_480)
    assert [shard.samples for shard in writer.shards] == [2, 1, 2, 1, 1]
    assert [shard.bytes > 20_480 for shard in writer.shards] == [False, True, False, False, False]
    assert [shard.bytes for shard in writer.shards] == [len(data) for data in kept.values()]


def test_a_shard_is_a_plain_tar_with_webdataset_names(tmp_path):
    writer, kept = write(tmp_path, [Sample(b"a", "jpg", 7, "x/é.jpg"), Sample(b"b", "png", -1, "y")], 1 << 20)
    with tarfile.open(fileobj=io.BytesIO(kept[writer.shards[0].name])) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    assert contents == {
        "000000000.jpg": b"a",
        "000000000.cls": b"7",
        "000000000.json": '{"name": "x/é.jpg"}'.encode(),
        "000000001.png": b"b",
        "000000001.json": b'{"name": "y"}',
    }

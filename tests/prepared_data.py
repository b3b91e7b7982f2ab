"""What the tests of prepared data look at beside the images themselves."""

from __future__ import annotations

from esvit_core.data.shards.format import read_part, stored_objects
from esvit_core.data.shards.manifest import Manifest, Shard
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.storage import ObjectStore


def shards_of(dataset: ShardDataset) -> list[Shard]:
    """Return the shards of a data set, in order."""
    return [dataset.shard(number)[1] for number in range(len(dataset.shard_sizes))]


def shards_below(store: ObjectStore, prefix: str) -> list[tuple[str, Shard]]:
    """Return the addresses and descriptions of all shards of prepared data."""
    found = []
    for reference in Manifest.read(store, prefix).parts:
        folder = reference.folder(prefix)
        found += [(shard.address(folder), shard) for shard in read_part(store, prefix, reference).shards]
    return found


def names_of_objects(store: ObjectStore, prefix: str) -> set[str]:
    """Return the names of the objects that prepared data consist of, as their manifest and parts say."""
    return {*stored_objects(store, prefix, Manifest.read(store, prefix)), "manifest.json"}

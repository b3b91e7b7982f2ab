"""Which files of a source are what they were when it was looked at, or prepared, before."""

from __future__ import annotations

from esvit_core.data.ingest.archives import Entry, Source
from esvit_core.data.ingest.incremental import Base, read_listing
from esvit_core.data.ingest.listing import File, Look, reader, recognise
from esvit_core.data.shards.manifest import Manifest
from esvit_core.storage import ObjectStore


def as_seen(opened: Source, seen: Look | None) -> list[Entry]:
    """The files of a source, without those that have come or changed since it was looked at."""
    if seen is None:
        return opened.entries
    looked = {file.name: file for file in seen.files}
    return [e for e in opened.entries if e.name in looked and looked[e.name].is_same(e)]


def recognised(earlier: Base, entries: list[Entry], seen: Look | None, opened: Source) -> list[File]:
    """The files of a source, with digests where only those tell whether the earlier data still hold them."""
    looked = {file.name: file for file in seen.files} if seen else {}
    now = [looked.get(entry.name) or File(entry.name, entry.size, entry.stamp) for entry in entries]
    return recognise(earlier.files.values(), now, reader(opened))


def warn_of_edits(store: ObjectStore, destination: str, present: Manifest, opened: Source) -> None:
    """Tell of files that were edited after they were prepared, where the fingerprint of the source cannot show it."""
    if present.listing is None:
        return
    before = {file.name: file for file in read_listing(store, destination, present)}
    now = recognise(before.values(), [File(e.name, e.size, e.stamp) for e in opened.entries], reader(opened))
    edited = [file.name for file in now if file.digest and not before[file.name].is_same(file)]
    if edited:
        others = f" and {len(edited) - 3:,} more" if len(edited) > 3 else ""
        print(
            f"warning: {len(edited):,} of the files have other content than when they were prepared, under the same "
            f"name and of the same size: {', '.join(edited[:3])}{others}; what was prepared is kept. Rename them to "
            "prepare them anew",
            flush=True,
        )

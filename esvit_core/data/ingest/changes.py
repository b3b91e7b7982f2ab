"""Decide which files of a source are unchanged since an earlier scan or preparation."""

from __future__ import annotations

from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.entries import Entries
from esvit_core.data.ingest.file_kinds import is_sidecar
from esvit_core.data.ingest.incremental import Base, read_listing
from esvit_core.data.ingest.listing import File, Scan, content_reader, hash_touched_files
from esvit_core.data.shards.manifest import Manifest
from esvit_core.storage import ObjectStore


def scanned_entries(opened: Source, scan: Scan | None) -> Entries:
    """Return the files of a source without those that were added or changed after the scan."""
    if scan is None:
        return opened.entries
    scanned = {file.name: file for file in scan.files}
    # Files that are no images are not scanned; a table of labels is used as it is now.
    return Entries(
        e for e in opened.entries if is_sidecar(e.name) or (e.name in scanned and scanned[e.name].is_same(e))
    )


def hash_touched_entries(base: Base, entries: Entries, scan: Scan | None, opened: Source) -> list[File]:
    """Return the files of a source, with digests where only those show whether the earlier data are still valid."""
    scanned = {file.name: file for file in scan.files} if scan else {}
    now = [scanned.get(entry.name) or File(entry.name, entry.size, entry.stamp) for entry in entries]
    return hash_touched_files(base.files.values(), now, content_reader(opened))


def warn_of_edits(store: ObjectStore, destination: str, present: Manifest, opened: Source) -> None:
    """Warn about files that were edited after they were prepared and that the source's fingerprint does not cover."""
    if present.listing is None:
        return
    before = {file.name: file for file in read_listing(store, destination, present)}
    now = hash_touched_files(
        before.values(), [File(e.name, e.size, e.stamp) for e in opened.entries], content_reader(opened)
    )
    edited = [file.name for file in now if file.digest and not before[file.name].is_same(file)]
    if edited:
        others = f" and {len(edited) - 3:,} more" if len(edited) > 3 else ""
        count = "1 file was" if len(edited) == 1 else f"{len(edited):,} files were"
        print(
            f"warning: {count} edited after being prepared, without a change of name or size: "
            f"{', '.join(edited[:3])}{others}; the prepared images are kept. Rename the files to prepare them again",
            flush=True,
        )

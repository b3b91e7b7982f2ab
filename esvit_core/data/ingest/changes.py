"""Decide which files of a source are unchanged since an earlier scan or preparation."""

from __future__ import annotations

from collections.abc import Iterator

from esvit_core.data.ingest.archives import Source
from esvit_core.data.ingest.entries import Entries, Entry
from esvit_core.data.ingest.file_kinds import is_sidecar
from esvit_core.data.ingest.incremental import Base, read_listing
from esvit_core.data.ingest.listing import File, Scan, content_reader, hash_touched_files
from esvit_core.data.shards.manifest import Manifest
from esvit_core.storage import ObjectStore


def scanned_entries(opened: Source, scan: Scan | None) -> Entries:
    """Return the files of a source without those that were added or changed after the scan."""
    if scan is None:
        return opened.entries
    files = scan.files

    def is_scanned(entry: Entry) -> bool:
        file = files.get(entry.name)
        return file is not None and file.is_same(entry)

    # Files that are no images are not scanned; a table of labels is used as it is now.
    return Entries(entry for entry in opened.entries if is_sidecar(entry.name) or is_scanned(entry))


def use_current_stamps(base: Base, entries: Entries, scan: Scan | None, opened: Source) -> None:
    """Give the unchanged files of earlier data their current stamps; those of which only the stamp changed are read."""

    def now() -> Iterator[File]:
        for entry in entries:
            yield (scan and scan.files.get(entry.name)) or File(entry.name, entry.size, entry.stamp)

    hashed = hash_touched_files(base.files, now(), content_reader(opened))
    base.use_current_stamps(now())
    base.use_current_stamps(hashed)


def warn_of_edits(store: ObjectStore, destination: str, present: Manifest, opened: Source) -> None:
    """Warn about files that were edited after they were prepared and that the source's fingerprint does not cover."""
    if present.listing is None:
        return
    before = read_listing(store, destination, present)
    now = (File(entry.name, entry.size, entry.stamp) for entry in opened.entries)
    hashed = hash_touched_files(before, now, content_reader(opened))
    edited = [file.name for file in hashed if file.digest and not before[file.name].is_same(file)]
    if edited:
        others = f" and {len(edited) - 3:,} more" if len(edited) > 3 else ""
        count = "1 file was" if len(edited) == 1 else f"{len(edited):,} files were"
        print(
            f"warning: {count} edited after being prepared, without a change of name or size: "
            f"{', '.join(edited[:3])}{others}; the prepared images are kept. Rename the files to prepare them again",
            flush=True,
        )

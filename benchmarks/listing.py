"""Measure the first half of a preparation, listing a source and planning what is stored, by number of files.

    python benchmarks/listing.py [--counts 10000 400000] [--kinds tar zip retraining]

Makes archives of so many small files, and lists each in a process of its own; with ``retraining`` a tar, which is compared
with an earlier listing with other dates. The last line is JSON: for each kind, the ratio of the peaks of memory, and the
seconds of processor time per 100,000 files of the last count.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_PLAN = """
from esvit_core.config import DataConfig
from esvit_core.data.ingest.ingest_plan import plan_ingest
from esvit_core.data.ingest.sources import open_source

start = time.process_time()
with open_source(sys.argv[1]) as opened:
    plan = plan_ingest(opened.entries, sys.argv[1], DataConfig(), read=opened.read)
    assert len(plan.candidates) == int(sys.argv[2])
"""
_COMPARE = """
from dataclasses import replace
from esvit_core.data.ingest.listing import FileTable, compare, content_digest, hash_touched_files, scan_source

start = time.process_time()
now, digest = scan_source(sys.argv[1], None).files, content_digest(b"x")
before = FileTable(replace(file, stamp="earlier", status="train", digest=digest) for file in now)
assert compare(before, now).changed == int(sys.argv[2])
now.update(hash_touched_files(before, now, lambda file: b"x"))
assert not compare(before, now).to_read
"""
_MEASURE = """
import json, sys, time
{measured}
seconds = time.process_time() - start
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM"))
print(json.dumps([int(peak.split()[1]) / 2**10, seconds]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 400_000], help="numbers of files")
    kinds = ["tar", "zip", "retraining"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            peaks = []
            for count in arguments.counts:
                peak, seconds = measure(archive(Path(folder), kind, count), count, kind)
                print(f"{kind} of {count:,} files: {peak:.0f} MiB, {seconds:.2f} s of processor time", flush=True)
                peaks.append(peak)
            figures[f"{kind}_memory_growth"] = peaks[-1] / peaks[0]
            figures[f"{kind}_seconds_per_100k"] = seconds / arguments.counts[-1] * 100_000
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


def measure(path: Path, count: int, kind: str) -> tuple[float, float]:
    """Return the peak of the memory, MiB, and the processor time, seconds, of listing and planning or comparing."""
    measured = _COMPARE if kind == "retraining" else _PLAN
    command = [sys.executable, "-c", _MEASURE.replace("{measured}", measured), str(path), str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak, seconds = json.loads(done.stdout)
    return float(peak), float(seconds)


def archive(folder: Path, kind: str, count: int) -> Path:
    """Write an archive of small files in folders of a thousand."""
    path = folder / f"{count}.{kind}"
    names = (f"{number // 1000:04d}/{number:07d}.png" for number in range(count))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        return path
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
            tar.members.clear()  # type: ignore[attr-defined]
    return path


if __name__ == "__main__":
    main()

"""Concurrent and killed preparations: nothing that was finished is lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
from prepared_data import names_of_objects

from esvit_core.config import DataConfig
from esvit_core.data.ingest import fingerprint
from esvit_core.data.ingest import prepare as prepare_module
from esvit_core.data.ingest import prepare_part as module
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.shards.manifest import Manifest
from esvit_core.data.shards.reader import ShardDataset
from esvit_core.errors import InfrastructureError, UserError
from esvit_core.storage import ObjectStore

CONFIG = DataConfig(val_fraction=0.3, shard_mib=0.01, max_bad_fraction=0.5)


@pytest.fixture
def source(folder, make) -> Path:
    """Three classes of six images, and two files that are not images."""
    return make.folder(folder, {"class0/bad.png": b"no image", "class2/bad.png": b"nor this"})


@pytest.fixture
def run(store, source, monkeypatch):
    """Prepare the source: ``manifest, names of the files that were read = run("data")``."""

    def prepared(at: str, config: DataConfig = CONFIG, base: str | None = None) -> tuple[Manifest, list[str]]:
        read: list[str] = []
        load = module.load
        with monkeypatch.context() as patch:
            patch.setattr(module, "load", lambda job, x: (read.append(x.entry.name), load(job, x))[1])
            manifest = prepare(str(source), store, store.uri(at), config, base=base and store.uri(base))
        return manifest, sorted(read)

    return prepared


def names_below(store, at: str) -> set[str]:
    return {stat.uri.removeprefix(store.uri(f"{at}/")) for stat in store.list(store.uri(at))}


def require_whole(store, at: str, tmp_path: Path) -> Manifest:
    """Check that exactly the objects of the manifest exist, and that they are valid."""
    manifest = Manifest.read(store, store.uri(at))
    assert names_below(store, at) == names_of_objects(store, store.uri(at))
    store.fetch(store.uri(at), tmp_path / f"all of {at}")
    for split in manifest.splits:
        dataset = ShardDataset(store, store.uri(at), split)
        assert all(dataset.image(i).ndim == 3 for i in range(len(dataset)))
    return manifest


def while_reading(monkeypatch, what) -> None:
    """Call ``what`` once, when the next preparation reads its first file."""
    load, begun = module.load, threading.Lock()

    def loads(*arguments):
        if begun.acquire(blocking=False):
            what()
        return load(*arguments)

    monkeypatch.setattr(module, "load", loads)


def test_data_finished_by_another_preparation_survive_an_interrupted_one(store, source, run, tmp_path, monkeypatch):
    def finish_another_and_be_interrupted() -> None:
        run("data")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        while_reading(patch, finish_another_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), store, store.uri("data"), CONFIG)
    assert require_whole(store, "data", tmp_path).samples == 18


def test_the_second_of_two_concurrent_preparations_adopts_the_data_of_the_first(
    store, source, run, tmp_path, monkeypatch, capsys
):
    first: list[Manifest] = []
    with monkeypatch.context() as patch:
        while_reading(patch, lambda: first.append(run("data")[0]))
        second = prepare(str(source), store, store.uri("data"), CONFIG)
    assert second == first[0] == require_whole(store, "data", tmp_path)
    assert "another preparation of the same content finished first" in capsys.readouterr().out


def test_a_concurrent_preparation_of_other_content_is_refused_and_damages_nothing(
    store, source, run, make, tmp_path, monkeypatch
):
    other = make.folder(tmp_path / "other", {f"{i}.png": make.file(500 + i) for i in range(9)})
    with monkeypatch.context() as patch:
        while_reading(patch, lambda: run("data"))
        with pytest.raises(UserError, match="with different content or settings"):
            prepare(str(other), store, store.uri("data"), CONFIG)
    assert require_whole(store, "data", tmp_path).samples == 18


def _prepare(store, source, at, results) -> None:
    results.put(prepare(str(source), store, store.uri(at), CONFIG).model_dump(mode="json"))


def test_processes_that_prepare_the_same_concurrently_agree(store, source, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_prepare, args=(store, source, "data", results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert found[0] == found[1] == found[2] == require_whole(store, "data", tmp_path).model_dump(mode="json")


def kill_at_put(store, source: Path, at: str, number: int, base: str | None = None) -> int:
    """Prepare in a process that is killed at its n-th put; return its exit code."""

    def child() -> None:
        puts = 0

        def counted(method):
            def put(*arguments, **named):
                nonlocal puts
                puts += 1
                if puts == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return method(*arguments, **named)

            return put

        for name in ("put_file", "put_bytes", "put_if_absent"):
            setattr(ObjectStore, name, counted(getattr(ObjectStore, name)))
        prepare(str(source), store, store.uri(at), CONFIG, base=base and store.uri(base))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    return process.exitcode or 0


def recorded(store, at: str) -> int:
    """Return the number of shards with a stored record."""
    return sum(name.startswith("unfinished/") for name in names_below(store, at))


def test_a_preparation_resumes_wherever_it_was_killed(store, source, run, tmp_path):
    undisturbed, all_files = run("undisturbed")
    shards, parts = undisturbed.shard_count, len(list(undisturbed.parts))
    assert shards >= 5 and len(all_files) == 20
    # Shards with their records; of each part the index, the listing, the record and the part; two lists, statistics, manifest.
    puts = 2 * shards + 4 * parts + 4
    assert kill_at_put(store, source, "whole", puts + 1) == 0
    for number in range(1, puts + 1):
        at = f"killed{number}"
        assert kill_at_put(store, source, at, number) == -signal.SIGKILL
        kept = recorded(store, at)
        manifest, read = run(at)
        assert manifest == undisturbed
        assert names_below(store, at) == names_of_objects(store, store.uri(at))
        # Only the files of shards that were not stored are read again.
        assert len(read) <= 20 - kept and (kept < shards or read == [])
    require_whole(store, "killed6", tmp_path)


def test_stored_shards_are_not_stored_again(store, source, run, monkeypatch):
    assert kill_at_put(store, source, "data", 6) == -signal.SIGKILL
    arrived = {name for name in names_below(store, "data") if name.startswith("shards/")}
    assert len(arrived) >= 2
    stored: list[str] = []
    put = ObjectStore.put_file
    monkeypatch.setattr(
        ObjectStore, "put_file", lambda self, uri, path, **k: (stored.append(uri), put(self, uri, path, **k))[1]
    )
    manifest, _ = run("data")
    assert not {store.uri(f"data/{name}") for name in arrived} & {*stored}
    assert sum("/shards/" in uri for uri in stored) + len(arrived) == manifest.shard_count


def test_an_incremental_preparation_resumes(store, source, run, make, tmp_path):
    run("one")
    make.folder(source, {f"class{i}/new{j}.png": make.file(900 + 10 * i + j) for i in range(3) for j in range(6)})
    undisturbed, all_new = run("undisturbed", base="one")
    assert len(all_new) == 18
    assert kill_at_put(store, source, "two", 4, base="one") == -signal.SIGKILL
    manifest, read = run("two", base="one")
    assert manifest == undisturbed and 0 < len(read) < 18


def test_an_image_edited_in_between_is_read_again(store, source, run, make, monkeypatch, capsys):
    monkeypatch.setattr(fingerprint, "SAMPLE", 0)  # in a large source, most files are not in the sample
    assert kill_at_put(store, source, "data", 6) == -signal.SIGKILL
    for path in source.rglob("*.png"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # the same image in a different file
        path.write_bytes(data)
        os.utime(path, (1_000, 1_000))
    manifest, read = run("data")
    assert len(read) >= 20 and "starting over" in capsys.readouterr().out
    fresh, _ = run("fresh")
    assert manifest.splits == fresh.splits


def test_changed_dates_alone_do_not_start_over(store, source, run):
    assert kill_at_put(store, source, "data", 6) == -signal.SIGKILL
    for path in source.rglob("*.png"):
        os.utime(path, (1_000, 1_000))
    assert len(run("data")[1]) < 20


@pytest.mark.parametrize("change", ["settings", "content"])
def test_leftovers_of_other_content_are_not_used_and_are_removed(store, source, run, make, tmp_path, change):
    assert kill_at_put(store, source, "data", 6) == -signal.SIGKILL
    config = CONFIG
    if change == "settings":
        config = CONFIG.model_copy(update={"store_short_side": 10})
    else:
        make.folder(source, {"class0/another.png": make.file(77)})
    assert len(run("data", config)[1]) >= 20
    require_whole(store, "data", tmp_path)


@pytest.mark.parametrize("damage", ["a record", "a shard"])
def test_a_damaged_record_or_a_missing_shard_is_done_again(store, source, run, damage):
    assert kill_at_put(store, source, "data", 6) == -signal.SIGKILL
    folder = "unfinished/" if damage == "a record" else "shards/"
    (name, *_) = sorted(name for name in names_below(store, "data") if name.startswith(folder))
    if damage == "a record":
        store.put_bytes(store.uri(f"data/{name}"), b"damaged")
    else:
        store.remove(store.uri(f"data/{name}"))
    assert run("data")[0] == run("undisturbed")[0]


def test_shards_removed_meanwhile_are_an_error(store, source, monkeypatch):
    merge = prepare_module.merge_parts

    def pruned(job, parts):
        merged = merge(job, parts)
        store.remove(store.uri(f"data/{next(name for name in merged.objects if name.startswith('shards/'))}"))
        return merged

    monkeypatch.setattr(prepare_module, "merge_parts", pruned)
    with pytest.raises(InfrastructureError, match="removed while the data were being prepared"):
        prepare(str(source), store, store.uri("data"), CONFIG)
    assert not store.exists(store.uri("data/manifest.json"))

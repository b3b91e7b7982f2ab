"""Preparation in several processes, with uploads while the next shard is filled, and killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
from prepared_data import shards_below

from esvit_core.config import DataConfig
from esvit_core.data.ingest import prepare as prepare_module
from esvit_core.data.ingest import prepare_part as module
from esvit_core.data.ingest.decoders import Decoders, DecodeSettings, choose_processes
from esvit_core.data.ingest.pixels import PixelSettings
from esvit_core.data.ingest.prepare import prepare
from esvit_core.errors import InfrastructureError
from esvit_core.storage import ObjectStore

SMALL = {"val_fraction": 0.1, "shard_mib": 0.01, "max_bad_fraction": 0.5}


def names_below(store, at: str) -> set[str]:
    return {stat.uri.removeprefix(store.uri(f"{at}/")) for stat in store.list(store.uri(at))}


@pytest.fixture
def images(tmp_path, make):
    """120 images, ten of which are converted, and three bad files."""
    files = {f"class{i % 3}/{i}.png": make.file(i) for i in range(110)}
    files |= {f"class0/{i}.webp": make.file(i, "WEBP") for i in range(10)}
    files |= {f"class1/bad{i}.png": b"no image" for i in range(3)}
    return make.folder(tmp_path / "source", files)


def test_the_number_of_processes_changes_nothing(store, prepared, images):
    alone = prepared(images, at="alone", processes=0, **SMALL)
    assert len(alone.splits["train"].shard_samples) > 10 and alone.bad.count == 3 and alone.reencoded == 10
    for processes in (1, 3):
        assert prepared(images, at=f"by {processes}", processes=processes, **SMALL) == alone


def test_so_many_processes_are_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert choose_processes(DataConfig(), 10_000) == 6 and choose_processes(DataConfig(), 10) == 0
    assert choose_processes(DataConfig(processes=2), 10) == 2 and choose_processes(DataConfig(processes=0), 10_000) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert choose_processes(DataConfig(), 10_000) == 0


def test_a_process_that_dies_is_an_error_that_names_the_setting(make):
    with Decoders() as decoders:
        decoders.start(2)
        decoders.configure(DecodeSettings.of(DataConfig(), PixelSettings()))
        assert decoders.decode(make.file(0), ".png").data == make.file(0)
        for process in decoders._all:
            process.popen.kill()
            process.popen.wait()
        with pytest.raises(InfrastructureError, match=r"SIGKILL \(out of memory\?\); run again.*data\.processes"):
            decoders.decode(make.file(0), ".png")


@pytest.fixture
def started(monkeypatch) -> list:
    """The processes that preparations start."""
    found: list = []
    begin = Decoders.start

    def start(self, processes: int) -> None:
        begin(self, processes)
        found.extend(process for process in self._all if process not in found)

    monkeypatch.setattr(Decoders, "start", start)
    return found


def test_the_processes_end_with_the_preparation(prepared, images, monkeypatch, started):
    monkeypatch.setattr(prepare_module, "merge_parts", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(images, processes=2, **SMALL)
    assert len(started) == 2 and all(process.popen.poll() == 0 for process in started)


def test_processes_that_were_started_for_nothing_end_at_once(prepared, images, monkeypatch, started):
    monkeypatch.setattr(prepare_module, "plan_ingest", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepared(images, processes=2, **SMALL)
    assert len(started) == 2 and all(process.popen.poll() == -signal.SIGKILL for process in started)


def test_no_process_starts_for_data_that_are_prepared(prepared, images, started):
    first = prepared(images, processes=2, **SMALL)
    assert len(started) == 2
    assert prepared(images, processes=2, **SMALL) == first
    assert len(started) == 2


def test_an_upload_that_fails_ends_the_preparation(store, prepared, images, monkeypatch):
    put = ObjectStore.put_file

    def failing(self, uri, path, **named):
        if "train-00000-003" in uri:
            raise InfrastructureError("the store is gone")
        put(self, uri, path, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", failing)
        with pytest.raises(InfrastructureError, match="the store is gone"):
            prepared(images, **SMALL)
    assert not store.exists(store.uri("data/manifest.json"))
    assert prepared(images, **SMALL) == prepared(images, at="undisturbed", **SMALL)


def _prepare_slowly(store, source: str, at: str) -> None:
    put = ObjectStore.put_file
    ObjectStore.put_file = lambda self, uri, path, **named: (time.sleep(0.01), put(self, uri, path, **named))[1]  # type: ignore[method-assign]
    prepare(source, store, store.uri(at), DataConfig(**SMALL, processes=2))


@pytest.mark.parametrize("seed", range(3))
def test_a_preparation_killed_at_a_random_moment_reuses_what_it_uploaded(store, prepared, images, monkeypatch, seed):
    undisturbed = prepared(images, at="undisturbed", **SMALL)
    everything = {shard.name for _, shard in shards_below(store, store.uri("undisturbed"))}
    process = multiprocessing.get_context("fork").Process(target=_prepare_slowly, args=(store, str(images), "killed"))
    process.start()
    wanted = random.Random(seed).randrange(2, len(everything) - 3)
    end = time.monotonic() + 60
    while len(uploaded := names_below(store, "killed") & everything) < wanted and time.monotonic() < end:
        time.sleep(0.005)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    uploaded = names_below(store, "killed") & everything
    again: list[str] = []
    put = ObjectStore.put_file
    monkeypatch.setattr(
        ObjectStore, "put_file", lambda self, uri, path, **named: (again.append(uri), put(self, uri, path, **named))[1]
    )
    read: list[str] = []
    load = module.load
    monkeypatch.setattr(module, "load", lambda job, x: (read.append(x.entry.name), load(job, x))[1])
    assert prepared(images, at="killed", **SMALL) == undisturbed
    sent = {uri.removeprefix(store.uri("killed/")) for uri in again}
    assert len(uploaded - sent) >= 0.95 * len(uploaded), "uploaded shards are not uploaded again"
    # The images of a shard are read again only if its record had not arrived: that of one shard at most.
    per_shard = undisturbed.samples / len(everything)
    assert len(read) <= undisturbed.samples + 3 - (len(uploaded) - 2) * per_shard

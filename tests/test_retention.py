"""Old runs go, and never one that somebody still goes by."""

from __future__ import annotations

import time
from typing import Any

import pytest

from esvit_core.runs.retention import DAY, plan_retention, remove_run, runs_named_by_pointers
from esvit_pipelines.cli.main import app

LATER = 100 * DAY


def make_run(store: Any, name: str, source: str = "") -> str:
    uri = store.uri(f"runs/{name}")
    store.put_bytes(f"{uri}/config.yaml", f"init: {{source: '{source}'}}\n".encode())
    store.put_bytes(f"{uri}/backbone/model.safetensors", b"12345")
    store.put_json(f"{uri}/backbone/manifest.json", {"format": "x"})
    return uri


def judge(store: Any, keep_days: float = 90, keep_last: int = 0, after: float = LATER) -> dict[str, str]:
    found = plan_retention(store, store.bucket, keep_days, keep_last, now=time.time() + after)
    return {run.name: run.kept_because for run in found}


def test_runs_go_by_the_time_of_their_last_object(store: Any) -> None:
    make_run(store, "a")
    make_run(store, "b")
    assert judge(store) == {"a": "", "b": ""}
    kept = judge(store, after=89 * DAY)
    assert all("within 90 days" in why for why in kept.values())


def test_the_newest_stay_whatever_their_age(store: Any) -> None:
    make_run(store, "older")
    time.sleep(1.1)  # listings have seconds
    make_run(store, "newer")
    assert judge(store, keep_last=1) == {"newer": "among the newest 1", "older": ""}


def test_what_a_pointer_or_its_history_names_stays(store: Any) -> None:
    runs = {name: make_run(store, name) for name in ("champion", "former", "compared", "champion-2", "other")}
    store.swap_pointer(
        store.uri("pointers/champion"),
        {
            "run": runs["champion"],
            "backbone": f"{runs['champion']}/backbone",
            "compared": {"run": runs["compared"]},
            "history": [{"run": "gone", "backbone": f"{runs['former']}/backbone"}],
        },
        None,
    )
    store.swap_pointer(store.uri("leases/champion"), {"run": make_run(store, "retrained"), "base": None}, None)
    judged = judge(store)
    assert [name for name, why in judged.items() if not why] == ["champion-2", "other"]
    assert judged["retrained"] == "pointer leases/champion names it"
    assert judged["former"] == "pointer champion names it"


def test_what_a_run_that_stays_started_from_stays(store: Any) -> None:
    first = make_run(store, "first")
    second = make_run(store, "second", source=f"{first}/training/checkpoints/00000010")
    make_run(store, "unrelated", source="timm:resnet50")
    third = make_run(store, "third", source=second)
    store.swap_pointer(store.uri("pointers/champion"), {"run": third}, None)
    judged = judge(store)
    assert judged == {
        "first": "run second started from it",
        "second": "run third started from it",
        "third": "pointer champion names it",
        "unrelated": "",
    }


def test_what_holds_images_of_a_run_that_stays_stays(store: Any) -> None:
    names = ["first", "second", "third"]
    uris = [make_run(store, name) for name in names]
    for uri, base in zip(uris, [None, *uris], strict=False):
        store.put_json(f"{uri}/data/manifest.json", {"base": base and f"{base}/data"})
    store.swap_pointer(store.uri("pointers/champion"), {"run": uris[2]}, None)
    assert judge(store) == {
        "first": "run second reuses its images",
        "second": "run third reuses its images",
        "third": "pointer champion names it",
    }


@pytest.mark.parametrize("text", [b"", b"[1, 2]", b"init: 3", b"init: {source: null}", b"\xff\xfe", b"a: [", None])
def test_a_configuration_that_cannot_be_read_stops_nothing(store: Any, text: bytes | None) -> None:
    uri = make_run(store, "odd")
    store.remove(f"{uri}/config.yaml") if text is None else store.put_bytes(f"{uri}/config.yaml", text)
    assert set(judge(store, keep_last=1)) == {"odd"}


def test_a_run_that_comes_to_life_or_to_honour_meanwhile_stays(store: Any) -> None:
    written, named = make_run(store, "written"), make_run(store, "named")
    judged = {run.name: run for run in plan_retention(store, store.bucket, 90, 0, now=time.time() + LATER)}
    assert not any(run.kept_because for run in judged.values())
    time.sleep(1.1)
    store.put_bytes(f"{written}/events/x.json", b"{}")
    store.swap_pointer(store.uri("pointers/other"), {"run": named}, None)
    assert not remove_run(store, judged["written"])
    assert not remove_run(store, judged["named"])
    assert store.exists(f"{written}/config.yaml") and store.exists(f"{named}/config.yaml")


def test_a_removed_run_is_gone_and_others_are_whole(store: Any) -> None:
    gone, other = make_run(store, "run"), make_run(store, "run-2")
    (run,) = [r for r in plan_retention(store, store.bucket, 90, 0, now=time.time() + LATER) if r.name == "run"]
    assert (run.objects, run.bytes > 0) == (3, True)
    assert remove_run(store, run)
    assert not list(store.list(gone)) and len(list(store.list(other))) == 3
    assert set(judge(store)) == {"run-2"}


def test_a_pointer_of_another_bucket_names_none_of_this_one(store: Any) -> None:
    make_run(store, "a")
    store.swap_pointer(store.uri("pointers/champion"), {"run": "s3://elsewhere/runs/a"}, None)
    assert runs_named_by_pointers(store, store.bucket) == {}


def test_the_command_says_what_it_does(
    store_env: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(store_env, "a")
    named = make_run(store_env, "b")
    store_env.swap_pointer(store_env.uri("pointers/champion"), {"run": named}, None)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + LATER)

    def prune(*arguments: str) -> str:
        bounds = ["--keep-days", "90", "--keep-last", "0", "--bucket", store_env.bucket]
        assert app(["store", "prune", *bounds, *arguments], standalone_mode=False) in (None, 0)
        return capsys.readouterr().out

    message = prune("--dry-run")
    assert "would remove  a" in message and "keep    b" in message and "pointer champion names it" in message
    assert "1 of 2 runs would be removed" in message
    assert store_env.exists(store_env.uri("runs/a/config.yaml"))
    assert "removed  a" in prune()
    assert not store_env.exists(store_env.uri("runs/a/config.yaml"))
    assert store_env.exists(store_env.uri("runs/b/config.yaml"))

"""`esvit retrain` with real processes: without new images, concurrent, killed and repeated, compared with the champion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from esvit_core.config import Config
from esvit_core.data.shards.manifest import Manifest
from esvit_core.errors import UserError
from esvit_core.registry.comparison import comparison_uri
from esvit_core.retraining.find_new_data import find_new
from esvit_core.runs.run import Run, open_run
from esvit_core.storage import ObjectStore
from esvit_core.storage.address import VARIABLES
from esvit_core.storage.embedded import EmbeddedStore

POINTER = "s3://esvit/pointers/champion"
# The first test waits for a whole retraining, which takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Retrained:
    """The results of four commands: without new images, one that was killed, the same repeated, and once more.

    Args:
        folder: the working directory.
        before: output of the first command.
        killed: output of the second command, until extract features.
        beside: result of a concurrent command during the second one.
        refused: error of another owner at that time.
        again: output of the third command.
        after: output of the fourth command.
        champion: value of the pointer.
        run: run of the challenger.
    """

    folder: Path
    before: str
    killed: str
    beside: subprocess.CompletedProcess[str]
    refused: str
    again: str
    after: str
    champion: dict[str, Any]
    run: Run


@pytest.fixture(scope="module")
def retrained(
    finished_run: Any, finished_store: EmbeddedStore, images: Any, esvit: Any, tmp_path_factory: Any
) -> Iterator[Retrained]:
    """Retrain the session's run in a store of its own; the run is the champion whether or not it was promoted."""
    folder = tmp_path_factory.mktemp("retrained")
    shutil.copytree(finished_run.folder / "images", folder / "images")
    shutil.copy2(finished_run.folder / "micro.yaml", folder / "micro.yaml")
    server = EmbeddedStore(folder / "out" / "store")
    store, theirs = ObjectStore(server.start()), ObjectStore(finished_store.start())
    try:
        store.ensure_bucket("esvit")
        for stat in theirs.list(finished_run.uri):
            store.put_bytes(stat.uri, theirs.get_bytes(stat.uri))
        champion = {"run": finished_run.uri, "backbone": f"{finished_run.uri}/backbone", "metric": "knn/5"}
        store.put_json(POINTER, champion)

        options = ["--data", "images", "--recipe", "micro.yaml", "--out", "out", "--set", "retrain.min_new_images=6"]
        arguments = ["retrain", *options]

        def ask() -> str:
            done = esvit(*arguments, cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            return str(done.stdout)

        before = ask()
        for path in images.folder(folder / "more", ["lines", "waves", "bars"], 18).rglob("*.png"):
            if not (there := folder / "images" / path.relative_to(folder / "more")).exists():
                path.rename(there)
        killed, beside = _killed(arguments, folder, esvit)
        config = Config.load(folder / "micro.yaml")
        with pytest.raises(UserError) as refused:
            find_new(config, str(folder / "images"), "another machine", store)
        again, after = ask(), ask()
        name = re.findall(r"^log out/(\S+)/run.log", again, re.MULTILINE)[0]
        run = open_run(f"s3://esvit/runs/{name}", store)
        yield Retrained(folder, before, killed, beside, str(refused.value), again, after, champion, run)
    finally:
        server.stop()


def _killed(arguments: list[str], folder: Path, esvit: Any) -> tuple[str, subprocess.CompletedProcess[str]]:
    """Run the command, start it once more meanwhile, and kill it when the features are extracted."""
    process = subprocess.Popen(
        [sys.executable, "-m", "esvit_pipelines", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k not in VARIABLES},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    message, beside = "", None
    try:
        assert process.stdout
        for line in process.stdout:
            message += line
            if re.search(r"^\[\d+/\d+\] pretrain", line):
                beside = esvit(*arguments, cwd=folder)
            if "extract features" in line:
                break
    finally:
        process.kill()
        process.wait()
    assert beside is not None, message
    return message, beside


def headers(output: str) -> list[str]:
    return re.findall(r"^\[\d+/\d+\] (.*)$", output, re.MULTILINE)


def test_without_new_images_no_step_starts(retrained: Retrained, finished_run: Any) -> None:
    assert retrained.before == f"nothing to do: images has 0 new files since {finished_run.name}\n"
    assert retrained.after == f"nothing to do: images has 0 new files since {retrained.run.name}\n"


def test_a_concurrent_retraining_names_the_owner(retrained: Retrained) -> None:
    assert retrained.beside.returncode == 2
    assert retrained.beside.stderr == (
        f"error: run {retrained.run.name}: another esvit command is running it; wait for that command, or stop it with Ctrl-C\n"
    )
    assert re.match(
        rf"retrain: \S+:{retrained.folder}/out has held the lease on {retrained.run.uri} since ", retrained.refused
    )


def test_a_killed_retraining_reuses_finished_steps(retrained: Retrained) -> None:
    assert retrained.again.startswith("resumed: images has 6 new files since ")
    found = retrained.again.partition("extract features")[0]
    assert found.count("already done") == 2 and "already done: found data/manifest.json" in found
    assert headers(retrained.again) == [
        *("find new data", "prepare new data", "prepare transfer sets", "pretrain", "extract features"),
        *("k-NN", "linear probe", "transfer", "visualize", "compare with the champion", "report", "promote"),
    ]
    assert headers(retrained.killed) == headers(retrained.again)[:5]


def test_only_new_images_are_prepared(retrained: Retrained) -> None:
    assert re.search(r"prepare  6/6 images", retrained.killed)
    manifest = Manifest.read(retrained.run.store, retrained.run.at("data"))
    assert manifest.samples == 54 and manifest.base == f"{retrained.champion['run']}/data"


def test_training_starts_from_the_champion(retrained: Retrained) -> None:
    config, asked = retrained.run.config, Config.load(retrained.folder / "micro.yaml")
    assert (config.init.source or "").startswith(f"{retrained.champion['run']}/training/checkpoints/")
    assert config.optimizer.lr == pytest.approx(asked.optimizer.lr / 10) and config.training.epochs == 1
    assert "train: starting from s3://" in retrained.killed


def test_champion_and_challenger_are_measured_on_the_same_images(retrained: Retrained) -> None:
    store, run = retrained.run.store, retrained.run
    compared = store.get_json(comparison_uri(run.uri, retrained.champion))
    decision = store.get_json(run.at("promotion.json"))
    assert compared["how"] == "the run started from it"
    own = store.get_json(run.at("evaluation/knn.json"))["results"]
    assert decision["figures"]["knn/5"] == {"run": own["trained"]["knn/5"], "champion": own["baseline"]["knn/5"]}
    assert f"promoted  {'yes' if decision['promoted'] else 'no'}, {decision['reason']}" in retrained.again
    assert (store.read_pointer(POINTER).value["run"] == run.uri) is decision["promoted"]
    assert f"champion {retrained.champion['run'].rpartition('/')[2]} (the run started from it): " in retrained.again

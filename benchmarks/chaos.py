"""Kill trainings at random moments, and count what is lost: ``make chaos``.

Every run is the demo's recipe on two processes: shortened to 30 steps with a checkpoint every 4, or, with --whole, all
of its 792 steps. One run is not disturbed. Each of the others is killed once (a rank, the agent, the launcher, the
object store), in some cases its newest checkpoint is damaged, and it is restarted until it finishes. Its weights must
then equal those of the undisturbed run, bit for bit, and its steps must have seen the same samples. Three more runs
follow: the number of processes changes within an epoch; one of two nodes dies and comes back; the store is unavailable
for a minute.

    python benchmarks/chaos.py --kills 20 --seed 1 [--whole] [--only-kills]

The last line is JSON: {"kills": n, "bitwise_equal": n, "samples_lost": n, "samples_repeated": n}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from esvit_core.config import Config
from esvit_core.data.ingest.prepare import prepare
from esvit_core.data.loading.sampler import epoch_order
from esvit_core.data.shards.manifest import Manifest
from esvit_core.runs.run import open_run
from esvit_core.runs.training_summary import read_summary
from esvit_core.storage import ObjectStore
from esvit_core.storage.embedded import EmbeddedStore
from esvit_core.training.sample_trace import TRACE_VARIABLE, samples_that_count

ROOT = Path(__file__).parents[1]
SETTINGS = ("training.processes=2", "training.metrics_port=null")
SHORT = ("data.max_images=400", "training.epochs=10", "training.checkpoint_steps=4")
VICTIMS = ("rank", "agent", "launcher", "store")
DAMAGES = ("", "", "truncated", "byte flipped", "manifest missing")
PATIENCE = 900.0  # seconds to wait for an event
LAUNCH = """
from esvit_core.errors import step
from esvit_core.runs.run import open_run
from esvit_core.launch.launcher import launch_training
run = open_run({uri!r})
with step("pretrain"):
    launch_training(run.uri, run.config)
"""


@dataclass
class ChaosRun:
    """A run whose processes are started, killed and restarted."""

    uri: str
    store: ObjectStore
    trace: Path
    log: Path
    kills: int = 0
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def launch(self) -> subprocess.Popen[bytes]:
        return self.start([sys.executable, "-c", LAUNCH.format(uri=self.uri)])

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | {TRACE_VARIABLE: str(self.trace), "PYTHONPATH": str(ROOT)} | environment,
                stdout=log,
                stderr=log,
            )
        self.started.append(process)
        return process

    def processes(self, agent: bool) -> list[psutil.Process]:
        """Live processes of this run: its agent, or its ranks."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            command = " ".join(process.info["cmdline"] or [])
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and f"--run-uri {self.uri}" in command and ("launch.agent" in command) == agent:
                found.append(process)
        return found

    def checkpoint(self) -> int:
        pointer = self.store.read_pointer(f"{self.uri}/training/latest")
        return int(pointer.value["step"]) if pointer else 0

    def step(self) -> int:
        """Last step that any process has begun."""
        return max(samples_that_count(self.trace), default=0)

    def finished(self) -> bool:
        return self.store.exists(f"{self.uri}/training/summary.json")

    def weights(self) -> str:
        manifest = self.store.read_manifest(f"{self.uri}/backbone")
        return "" if manifest is None else str(manifest["files"]["model.safetensors"]["sha256"])

    def worlds(self) -> list[int]:
        """Number of processes of each attempt."""
        files = [path for path in sorted(self.trace.glob("*-0.jsonl")) if path.stat().st_size]
        return [json.loads(path.read_text(encoding="utf-8").partition("\n")[0])["world"] for path in files]


class Testbed:
    """A store with prepared data, and runs of the demo's recipe with the given settings in it."""

    def __init__(self, folder: Path, settings: Sequence[str]) -> None:
        self.folder = folder
        self.server = EmbeddedStore(folder / "store")
        os.environ |= self.server.start().environment()
        self.store = ObjectStore.from_env()
        self.config = Config.load("demo", settings)
        self.store.ensure_bucket(self.config.bucket)
        self.data = f"s3://{self.config.bucket}/data"
        prepare(str(ROOT / "samples" / "clipart.zip"), self.store, self.data, self.config.data)

    def run(self, name: str, **training: Any) -> ChaosRun:
        values = self.config.model_dump()
        values["training"] |= training
        uri = f"s3://{self.config.bucket}/runs/{name}"
        for stat in self.store.list(self.data):
            self.store.put_bytes(stat.uri.replace(self.data, f"{uri}/data"), self.store.get_bytes(stat.uri))
        self.store.put_bytes(f"{uri}/config.yaml", Config.from_mapping(values).to_yaml().encode())
        return ChaosRun(uri, self.store, self.folder / f"trace-{name}", self.folder / f"{name}.log")

    def kill_store(self) -> None:
        if (status := self.server.status()) is not None:
            server = psutil.Process(status.pid)
            server.kill()
            psutil.wait_procs([server], timeout=30)


def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {PATIENCE:.0f} s for {what}")
        time.sleep(0.05)


def lost_and_repeated(run: ChaosRun, last_step: int) -> tuple[int, int]:
    """Count the samples that were not seen, and those seen too often, over all steps up to the last."""
    config, train = open_run(run.uri).config, Manifest.read(run.store, f"{run.uri}/data").splits["train"]
    batch, sizes = config.training.batch_size, train.shard_samples
    steps = sum(sizes) // batch
    orders = [epoch_order(config.seed, epoch, sizes) for epoch in range(-(-last_step // steps))]
    whole = [order[batch * step : batch * (step + 1)].tolist() for order in orders for step in range(steps)]
    want = Counter((step, n) for step, numbers in enumerate(whole[:last_step], 1) for n in numbers)
    have = Counter((step, n) for step, numbers in samples_that_count(run.trace).items() for n in numbers)
    return (want - have).total(), (have - want).total()


def damage(run: ChaosRun, how: str) -> None:
    folder = f"{run.uri}/training/checkpoints/{run.checkpoint():08d}"
    if how == "manifest missing":
        run.store.remove(f"{folder}/manifest.json")
        return
    data = run.store.get_bytes(f"{folder}/student.pt")
    flipped = data[:3000] + bytes([data[3000] ^ 1]) + data[3001:]
    run.store.put_bytes(f"{folder}/student.pt", data[: len(data) // 2] if how == "truncated" else flipped)


def kill_once(testbed: Testbed, run: ChaosRun, victim: str, steps: int, rng: random.Random) -> str:
    """Start the run, kill ``victim`` at a random moment, and finish it; return a description of the moment.

    A quarter of the moments are in the seconds before the first step, the others around a random one of ``steps``.
    """
    launcher = run.launch()
    until(lambda: run.processes(agent=False), "the first process")
    step = 0 if rng.random() < 0.25 else rng.randrange(1, steps)
    until(lambda: run.step() >= step or launcher.poll() is not None, "a step")
    time.sleep(rng.uniform(0, 0.5 if step else 5))
    where = f"step {run.step():3}, checkpoint {run.checkpoint():3}"
    run.kills += 1
    if victim == "rank":
        for process in rng.sample(alive := run.processes(agent=False), min(1, len(alive))):
            process.kill()
    elif victim == "agent":
        for agent in run.processes(agent=True):
            agent.kill()
    elif victim == "launcher":
        launcher.kill()
    else:
        testbed.kill_store()
        time.sleep(rng.uniform(0.5, 8))
        testbed.server.start()
    launcher.wait(PATIENCE)
    until(lambda: not run.processes(agent=False), "the end of the processes")
    how = rng.choice(DAMAGES)
    if how and not run.finished() and run.checkpoint():
        damage(run, how)
        where += f", newest checkpoint {how}"
    for _ in range(3):
        if not run.finished():
            run.launch().wait(PATIENCE)
    return where


def has_moved(run: ChaosRun, step: int) -> bool:
    return run.step() > step


def change_worlds(run: ChaosRun, rng: random.Random) -> None:
    """Train with 2, 1, 3 and 2 processes; stop all but the last at a random moment."""
    with tempfile.TemporaryDirectory() as meeting:
        for number, world in enumerate((2, 1, 3, 2)):
            before = run.step()
            processes = [
                run.start(
                    [sys.executable, "-m", "esvit_core.training", "--run-uri", run.uri],
                    RANK=str(rank),
                    WORLD_SIZE=str(world),
                    TORCHELASTIC_RESTART_COUNT=str(number),
                    ESVIT_RENDEZVOUS_DIR=meeting,
                    OMP_NUM_THREADS="1",
                )
                for rank in range(world)
            ]
            if number < 3:
                until(partial(has_moved, run, before), "a step")
                rng.choice(processes).send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(PATIENCE)


def two_nodes(run: ChaosRun) -> str:
    """Kill one of two nodes and bring it back; return the numbers of processes of the attempts as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(host: bool) -> subprocess.Popen[bytes]:
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "50"]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "chaos"]
        conf = ["--rdzv-conf", f"is_host={str(host).lower()},last_call_timeout=2", "--local-addr", "127.0.0.1"]
        return run.start(
            [sys.executable, *torchrun, *meeting, *conf, "-m", "esvit_core.training", "--run-uri", run.uri],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            OMP_NUM_THREADS="1",
        )

    first, second = node(True), node(False)
    until(lambda: run.worlds()[-1:] == [2] and run.checkpoint(), "both nodes to train")
    second.kill()
    until(lambda: run.worlds()[-1:] == [1], "the other node to continue")
    second = node(False)
    until(lambda: run.worlds()[-1:] == [2], "the killed node to be admitted again")
    for process in (first, second):
        process.terminate()
    for process in (first, second):
        process.wait(PATIENCE)
    return " -> ".join(map(str, run.worlds()))


@contextmanager
def ending(runs: list[ChaosRun], testbed: Testbed) -> Iterator[None]:
    try:
        yield
    finally:
        for run in runs:
            for process in run.started:
                process.kill()
        testbed.server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only-kills", action="store_true", help="leave out the three runs after the kills")
    parser.add_argument("--whole", action="store_true", help="run the whole demo recipe instead of the shortened one")
    arguments = parser.parse_args()
    settings = SETTINGS if arguments.whole else (*SETTINGS, *SHORT)
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="esvit-chaos-") as folder:
        testbed = Testbed(Path(folder), settings)
        runs = [testbed.run("undisturbed")]
        with ending(runs, testbed):
            start = time.monotonic()
            runs[0].launch().wait(PATIENCE)
            seconds = time.monotonic() - start
            steps, weights = runs[0].step(), runs[0].weights()
            print(f"undisturbed: {steps} steps in {seconds:.0f} s, weights {weights[:12]}", flush=True)
            equal = lost = repeated = 0

            def report(run: ChaosRun, what: str, same_world: bool) -> None:
                nonlocal equal, lost, repeated
                missing, twice = lost_and_repeated(run, steps if run.finished() else run.checkpoint())
                lost, repeated = lost + missing, repeated + twice
                same = run.weights() == weights
                equal += same and same_world
                summary = read_summary(run.store, run.uri)
                at = "" if summary is None else f"; resumed at {summary.resumes}"
                how = ("equal" if same else "DIFFERENT") if same_world else "another world"
                print(f"{what}{at}; {how}; lost {missing}, repeated {twice}", flush=True)

            for number in range(arguments.kills):
                runs.append(run := testbed.run(f"killed-{number}"))
                victim = VICTIMS[number % len(VICTIMS)]
                report(run, f"{number + 1:2}  {victim:8}  at {kill_once(testbed, run, victim, steps, rng)}", True)
            if not arguments.only_kills:
                runs.append(run := testbed.run("worlds"))
                change_worlds(run, rng)
                report(run, f"worlds {' -> '.join(map(str, run.worlds()))}", False)
                runs.append(run := testbed.run("nodes", epochs=1000))
                report(run, f"two nodes, one killed and back: {two_nodes(run)}", False)
                runs.append(run := testbed.run("outage"))
                launcher = run.launch()
                until(lambda: run.checkpoint(), "a checkpoint")
                before = run.step()
                testbed.kill_store()
                run.kills += 1
                time.sleep(60)
                testbed.server.start()
                launcher.wait(PATIENCE)
                report(run, f"store unavailable for 60 s from step {before} on, launched {len(run.started)} time", True)
            kills = sum(run.kills for run in runs)
    result = {"kills": kills, "bitwise_equal": equal, "samples_lost": lost, "samples_repeated": repeated}
    print(json.dumps(result), flush=True)
    return int(equal < kills or lost > 0 or repeated > 0)


if __name__ == "__main__":
    sys.exit(main())

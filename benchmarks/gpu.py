"""Measure a training on one GPU in at most eight minutes, and write JSON and a Markdown table for docs/performance.md.

    python benchmarks/gpu.py --out gpu-results
    python benchmarks/gpu.py --out gpu-results --reference ../esvit --profile

Every part runs in a process of its own with a time limit. A part that fails, or for which no time is left, is listed
with the reason, and the others are measured all the same. The parts, in order:

- step: images per second, memory and share of the peak (MFU) of our step for each batch, in bfloat16
- loader: images per second that the training's workers decode and augment
- resume: one training is killed and started again; the time until it goes on
- compare: our step by parts, against the plain step in float16, or with --reference that of the published code
- profile: with --profile, a trace of three steps
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, peak_memory, reset_peak_memory

BUDGET_SECONDS = 470.0
LIMITS = {"step": 130.0, "loader": 60.0, "resume": 130.0, "compare": 200.0, "profile": 60.0}
# Dense bfloat16 operations per second, from NVIDIA's data sheets, by a part of torch's name of the device.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
WARM_UP = 3


def settings(options: argparse.Namespace, *more: str) -> Any:
    from esvit_core.config import Config

    return Config.load(options.recipe, [*options.set, *more])


def make_step(options: argparse.Namespace, batch_size: int) -> tuple[Any, Callable[[], None]]:
    """Return the state of a training of ``batch_size`` images, and its step."""
    from noise_batch import noise_batch

    from esvit_core.training.cuda_graphs import compile_and_graph_networks_
    from esvit_core.training.distributed.processes import World
    from esvit_core.training.loop import training_step
    from esvit_core.training.state import assemble_train_state, make_deterministic

    class OneBatch:
        steps_per_epoch = 1

    config = settings(options, f"training.batch_size={batch_size}")
    if config.training.deterministic:
        make_deterministic()
    device = torch.device("cuda", 0)
    state = assemble_train_state(config, World(0, 1, device, None), OneBatch())  # type: ignore[arg-type]
    state.blocks = compile_and_graph_networks_(state)
    batch = noise_batch(config, batch_size)

    def step() -> None:
        training_step(state, batch, state.schedule_values())

    return state, step


def measure_step(options: argparse.Namespace) -> dict[str, Any]:
    """Time the step for each batch; the copy of the crops to the device and their colors are part of it."""
    from esvit_core.planning.count_operations import count_demand

    device, found = torch.device("cuda", 0), {}
    peak = next((value for name, value in PEAKS.items() if name in torch.cuda.get_device_name(device)), None)
    for batch_size in options.batch:
        state, step = make_step(options, batch_size)
        for _ in range(WARM_UP):
            step()
        reset_peak_memory(device)
        seconds = []
        for _ in range(options.steps):
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        demand = count_demand(state.config, state.precision.dtype)
        rate = batch_size / statistics.median(seconds)
        found[str(batch_size)] = {
            "seconds": statistics.median(seconds),
            "slowest_seconds": max(seconds),
            "images_per_second": rate,
            "mfu": None if peak is None else rate * demand.flops / peak,
            "peak_bytes": peak_memory(device),
            "planned_bytes": demand.bytes(batch_size),
            "precision": state.precision.name,
            "objective": state.objective.strategy.name,
            "blocks": state.blocks,
        }
        del state, step
        torch.cuda.empty_cache()
    return found


def measure_loader(options: argparse.Namespace) -> dict[str, Any]:
    """Count the images per second of the training's loader on JPEGs of 500 x 375 pixels."""
    from esvit_core.data.loading.loader import TrainLoader
    from esvit_core.planning.rehearse import Noise
    from esvit_core.runs.environment import available_cores

    batch_size = options.batch[0]
    config = settings(options, f"training.batch_size={batch_size}")
    loader = TrainLoader(Noise(config, 1000 * batch_size), config, 0)
    loader.change_colors_on_gpu()
    loader.use_workers_for_gpu(1, available_cores())
    images, start = 0, 0.0
    for number, _ in enumerate(loader.epoch(0)):
        if number == 2 * loader.workers:  # those that were prepared while the workers started
            start = time.perf_counter()
        elif start:
            images += batch_size
            if time.perf_counter() - start > options.seconds:
                break
    rate = images / (time.perf_counter() - start)
    return {"workers": loader.workers, "cores": available_cores(), "images_per_second": rate}


LAUNCH = """
from esvit_core.launch.launcher import launch_training
from esvit_core.runs.run import open_run
run = open_run({uri!r})
launch_training(run.uri, run.config)
"""


def measure_resume(options: argparse.Namespace) -> dict[str, Any]:
    """Kill the demo's training after its first checkpoint, start it again, and read when it went on."""
    import psutil
    from plan import draw

    from esvit_core.config import Config
    from esvit_core.data.ingest.prepare import prepare
    from esvit_core.runs.log import read_log
    from esvit_core.runs.run import start_run
    from esvit_core.runs.training_summary import LATEST, read_summary
    from esvit_core.storage.session import open_store

    quick = [
        "training.processes=1",
        "training.log_steps=1",
        "training.checkpoint_steps=4",
        "training.metrics_port=null",
    ]
    config = Config.load("demo", [*quick, "training.epochs=3", "training.batch_size=32", "data.val_fraction=0"])
    with tempfile.TemporaryDirectory(prefix="esvit-gpu-") as folder, open_store(Path(folder) / "store") as store:
        os.environ.update(store.address.environment())
        images = Path(folder) / "images"
        images.mkdir()
        draw(images, 160, 96)
        run = start_run(config, str(images), store=store)
        prepare(str(images), store, run.at("data"), config.data)

        def launch() -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", LAUNCH.format(uri=run.uri)], stdout=sys.stderr)

        process, began = launch(), time.monotonic()
        while (pointer := store.read_pointer(run.at(LATEST))) is None or not pointer.value["step"]:
            if process.poll() is not None:
                raise RuntimeError(f"the training ended with exit code {process.returncode} before a checkpoint")
            time.sleep(0.05)
        first = time.monotonic() - began
        victims = [
            p for p in psutil.Process(process.pid).children(recursive=True) if "training" in " ".join(p.cmdline())
        ]
        for victim in (*victims, psutil.Process(process.pid)):
            victim.send_signal(signal.SIGKILL)
        process.wait()
        killed, started = len(read_log(store, run.uri)), time.time()
        if launch().wait() != 0:
            raise RuntimeError("the training did not finish when it was started again")
        summary = read_summary(store, run.uri)
        assert summary is not None
        after = [line for line in read_log(store, run.uri) if float(line["time"] or 0) > started]
        return {
            "resumed_from": summary.resumes,
            "log_lines_before": killed,
            "seconds_to_first_checkpoint": first,
            "seconds_to_first_step_after_kill": float(after[0]["time"] or 0) - started,
            "steps": summary.steps,
        }


def measure_compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run benchmarks/step.py, and keep its table and its last line."""
    command = [sys.executable, str(Path(__file__).with_name("step.py")), "--device", "cuda", "--dtype", "float16"]
    command += ["--batch", str(options.batch[0]), "--rounds", str(options.rounds)]
    if options.reference:
        command += ["--reference", str(options.reference)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {"table": text[:-1], **json.loads(text[-1])}


def measure_profile(options: argparse.Namespace) -> dict[str, Any]:
    """Write a trace of three steps for https://ui.perfetto.dev."""
    from torch.profiler import ProfilerActivity, profile

    _, step = make_step(options, options.batch[0])
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    path = options.out / "trace.json.gz"
    recorded.export_chrome_trace(str(path))
    return {"trace": path.name, "bytes": path.stat().st_size}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "step": measure_step,
    "loader": measure_loader,
    "resume": measure_resume,
    "compare": measure_compare,
    "profile": measure_profile,
}


def run_parts(names: list[str], budget: float) -> dict[str, Any]:
    """Run each part in a process of its own; return its result, or ``{"left_out": reason}``."""
    end, results = time.monotonic() + budget, {}
    for name in names:
        limit = min(LIMITS[name], end - time.monotonic())
        if limit < 5:
            results[name] = {"left_out": "no time is left"}
            continue
        print(f"{name}: at most {limit:.0f} s", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            output = ""
        finally:
            if process.poll() is None:  # it, and what it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            results[name] = json.loads(output.splitlines()[-1])
        elif process.returncode == -signal.SIGKILL:
            results[name] = {"left_out": f"not done within {limit:.0f} s"}
        else:
            results[name] = {"left_out": f"failed with exit code {process.returncode}, see above"}
    return results


def markdown(machine: str, command: str, results: dict[str, Any]) -> str:
    """Return the results as Markdown for docs/performance.md."""
    lines = [f"{machine}; `{command}`", "", "| what | figure |", "| --- | --- |"]
    for name, found in results.items():
        if "left_out" in found:
            lines.append(f"| {name} | not measured: {found['left_out']} |")
    steps = results.get("step", {})
    for batch_size, found in steps.items() if "left_out" not in steps else ():
        share = "" if found["mfu"] is None else f", {100 * found['mfu']:.0f} % of the peak"
        memory = f"{found['peak_bytes'] / 1e9:.1f} GB (planned {found['planned_bytes'] / 1e9:.1f})"
        speed = f"{1000 * found['seconds']:.1f} ms, {found['images_per_second']:,.0f} images/s{share}"
        lines.append(f"| step of {batch_size} images, {found['precision']}, {found['objective']} | {speed}, {memory} |")
    if rate := results.get("loader", {}).get("images_per_second"):
        found = results["loader"]
        lines.append(f"| loader, worker processes {found['workers']}, cores {found['cores']} | {rate:,.0f} images/s |")
    if "resumed_from" in (found := results.get("resume", {})):
        seconds = found["seconds_to_first_step_after_kill"]
        lines.append(f"| killed and started again | first step after {seconds:.1f} s, from {found['resumed_from']} |")
    if "step_bfloat16" in (found := results.get("compare", {})):
        lines.append(f"| our step, times as fast as the other | {found['step_bfloat16']:.2f} |")
        lines += ["", "```", *found["table"], "```"]
    return "\n".join(lines) + "\n"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and the trace")
    parser.add_argument("--recipe", default="imagenet_swin_tiny_w7")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128], help="images per step")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each batch")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the comparison")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure the loader")
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--profile", action="store_true", help="write a trace of three steps")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="measure these parts only")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main() -> None:
    options = arguments()
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("error: torch finds no GPU; this script measures one")
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.only or [name for name in PARTS if name != "profile" or options.profile]
    start = time.monotonic()
    results = run_parts(names, BUDGET_SECONDS)
    machine = describe(torch.device("cuda", 0))
    command = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    record = {"machine": machine, "command": command, "seconds": round(time.monotonic() - start, 1), **results}
    (options.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    text = markdown(machine, command, results)
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()

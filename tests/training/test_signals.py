"""Signals and processes: the time limits of a stop nest, and handlers leave nothing behind."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time

from torch.distributed.elastic.multiprocessing.api import PContext

from esvit_core.launch import signals
from esvit_core.launch.signals import SignalCounter, outlive_signals, restored_handlers


def test_every_time_limit_contains_those_of_the_processes_it_waits_for() -> None:
    assert signals.EXIT_MARGIN_SECONDS < signals.TRAINER_SECONDS < signals.AGENT_SECONDS < signals.LAUNCHER_SECONDS
    assert signals.AGENT_SECONDS < signals.POD_SECONDS < signals.JOB_SECONDS < signals.RUN_SECONDS
    assert (
        2 * signals.LAUNCHER_SECONDS < signals.RUN_SECONDS
    )  # the launcher waits for the agent, then for its processes
    assert 2 * signals.RESCHEDULED_SECONDS < 0.4  # how soon a stopped pod's container was gone, as seen on a cluster


def test_the_agents_time_limit_is_the_one_that_torch_elastic_applies() -> None:
    assert inspect.signature(PContext.close).parameters["timeout"].default == signals.AGENT_SECONDS


def test_signals_are_counted_and_the_handlers_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with restored_handlers():
        counter = SignalCounter()
        assert (counter.first, counter.count, counter.stopped.is_set()) == (0, 0, False)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        counter.sleep(600)  # returns at once: the signals arrived before it
        assert (counter.first, counter.count, counter.stopped.is_set()) == (signal.SIGTERM, 2, True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_ends_the_sleep() -> None:
    with restored_handlers():
        counter = SignalCounter()
        counter.sleep(0)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        counter.sleep(600)
        assert time.monotonic() - start < 300


def test_children_of_a_process_that_outlives_signals_end_on_them() -> None:
    with restored_handlers():
        outlive_signals((signal.SIGTERM,))
        os.kill(os.getpid(), signal.SIGTERM)
        child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
        child.stdout.readline()
        child.terminate()
        assert child.wait(60) == -signal.SIGTERM

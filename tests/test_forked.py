"""Forked programs begin with torch and without what the tests have changed."""

from __future__ import annotations

import signal

from forked import Forked


def test_torch_is_there_and_tests_are_not() -> None:
    program = "import sys; print(*(name in sys.modules for name in ('torch', 'timm', 'torch._dynamo', 'test_forked')))"
    assert Forked(program).communicate() == ("True True False False\n", "")


def test_arguments_environment_streams_and_exit_code_are_those_of_a_process() -> None:
    program = "import os, sys; print(sys.argv[1:], dict(os.environ)); sys.stderr.write('why'); sys.exit(3)"
    process = Forked(program, "a", "b c", environment={"NAME": "value"})
    assert process.communicate() == ("['a', 'b c'] {'NAME': 'value'}\n", "why")
    assert process.returncode == 3
    failed = Forked("1 / 0")
    assert "ZeroDivisionError" in failed.communicate()[1] and failed.returncode == 1


def test_a_signal_ends_it() -> None:
    process = Forked("import time; print('started', flush=True); time.sleep(600)")
    assert process.stdout.readline() == "started\n" and process.poll() is None
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM

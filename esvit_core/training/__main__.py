"""The training process: ``python -m esvit_core.training --run s3://bucket/runs/<id>``.

Several processes: ``torchrun --nproc-per-node 2 -m esvit_core.training --run-uri s3://bucket/runs/<id>`` (torchrun would
take ``--run`` for its own ``--run-path``). On nodes that come and go, run on each of them::

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise a node cannot rejoin (torch 2.14)
    torchrun --nnodes 2:4 --nproc-per-node 8 --max-restarts 100 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \
        --rdzv-id RUN -m esvit_core.training --run-uri s3://bucket/runs/<id>

Whenever torchrun restarts the processes, in any number, they resume from the newest checkpoint.

Exit codes: 0 finished (or was finished already); 2 a mistake in the input, or a run that had to be stopped (the reason
is the last line); 75 stopped on request with a checkpoint, or an infrastructure failure: a restart continues.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path

from esvit_core.errors import explained
from esvit_core.launch.agent import AGENT_VARIABLE
from esvit_core.launch.signals import StopRequest, end_with_parent, write_process_file
from esvit_core.runs.environment import TORCH_ENVIRONMENT


def main() -> int:
    """Train; return the exit code."""
    start = time.time()
    gc.disable()  # collections take a sixth of the time of the imports
    stop = StopRequest()
    stop.install()  # before anything that takes time
    if agent := os.environ.get(AGENT_VARIABLE):
        end_with_parent(int(agent))
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())  # torchrun's agent: a process that outlives it would disturb its successor
    for name, value in TORCH_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    write_process_file()
    parser = argparse.ArgumentParser(prog="python -m esvit_core.training", description="Pre-train the run's backbone.")
    parser.add_argument("--run", "--run-uri", required=True, help="s3://bucket/runs/<id>, with config.yaml and data/")
    run_uri: str = parser.parse_args().run
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # only rank 0 prints  # noqa: SIM115

    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from esvit_core.launch.outcome import mark_consequence, record_own_failure

    errors = get_error_handler()
    errors.initialize()
    try:
        from esvit_core.torch_private import import_timm_without_dynamo

        import_timm_without_dynamo()
        from esvit_core.training.main import run_training

        gc.freeze()
        gc.enable()
        return run_training(run_uri, stop)
    except Exception as error:
        known = explained(error)
        errors.record_exception(known or error)
        if known and known.consequence:
            mark_consequence()
        if not agent:
            if known and rank == 0:
                print(f"error: {known}", file=sys.stderr, flush=True)
            record_own_failure(run_uri, known or error, rank, start)
        if known is None:
            raise
        return known.exit_code


if __name__ == "__main__":
    # Not sys.exit: threads that wait for the store or for other processes must not keep a failed process alive.
    code = 1
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Spawn targets of a worker and of its further ranks. Imported by the server too, so nothing heavy at module level."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from typing import NoReturn

from gpu_pool.child import die_with_parent, enter_child, forgive_output, say
from gpu_pool.messages import WorkerStart


def worker_main(connection: Connection, start: WorkerStart, parent_pid: int) -> NoReturn:
    """Become the worker that `start` describes; ends with the process, by Shutdown or with the server.

    Exit status: 0 after Shutdown or when the control pipe closes, 1 when the model could not be served.
    """
    enter_child(parent_pid, start.log_path)
    say(f"starting with {start.tensor_parallel} slots for {start.spec.fingerprint}")  # scripts/record_trace.py reads it
    os.environ.update(_environment(start))
    from gpu_pool.worker.control import Control

    control = Control(connection)
    control.watch()  # before the imports, which take seconds or, from a slow disk, minutes
    from gpu_pool.worker.loop import run_worker  # imports torch, which reads the environment set above

    run_worker(control, start)


def rank_main(connection: Connection, start: WorkerStart, rank: int, parent_pid: int) -> NoReturn:
    """Become rank `rank` (from 1) of the worker `start`; ends with it.

    It stays in the worker's process group, writes to its log and has its environment.
    """
    die_with_parent(parent_pid)
    forgive_output()
    from gpu_pool.worker.rank import run_rank

    run_rank(connection, start, rank)


def _environment(start: WorkerStart) -> dict[str, str]:
    """What torch, OpenMP and tokenizers must find when they are imported."""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": start.visible_devices,
        "OMP_NUM_THREADS": str(start.threads_of_a_rank),
        "MKL_NUM_THREADS": str(start.threads_of_a_rank),
        "MKL_CBWR": "AUTO,STRICT",  # or the bits of products with few rows depend on how many threads share them
        "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait slow every neighbour down tenfold
        "TOKENIZERS_PARALLELISM": "false",
    }

"""Spawn target of a worker. Imported by the server too, so nothing heavy at module level."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection

from gpu_pool.child import enter_child
from gpu_pool.messages import WorkerStart


def worker_main(connection: Connection, start: WorkerStart, parent_pid: int) -> None:
    """Become the worker that `start` describes; ends with the process, by Shutdown or with the server.

    Exit status: 0 after Shutdown or when the control pipe closes, 1 when the model could not be served.
    """
    enter_child(parent_pid, start.log_path)
    os.environ.update(_environment(start))
    from gpu_pool.worker.loop import run_worker  # imports torch, which reads the environment set above

    sys.exit(run_worker(connection, start))


def _environment(start: WorkerStart) -> dict[str, str]:
    """What torch, OpenMP and tokenizers must find when they are imported."""
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": start.visible_devices,
        "OMP_NUM_THREADS": str(start.threads),
        "MKL_NUM_THREADS": str(start.threads),
        "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait slow every neighbour down tenfold
        "TOKENIZERS_PARALLELISM": "false",
    }

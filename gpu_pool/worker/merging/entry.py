"""Spawn target of a merge. The server imports this file: heavy imports stay inside the function."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_pool.child import enter_child
from gpu_pool.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    FromMerger,
    JobFailed,
    JobProgress,
    MergeDone,
    MergeStart,
    Ping,
    decode_to_merger,
    encode,
)


def merger_main(connection: Connection[Any, Any], start: MergeStart, parent_pid: int) -> None:
    """Merge what `start` says, tell the server how far it is and how it ended, and end."""
    enter_child(parent_pid, start.log_path)
    send = obey(connection)
    os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")  # it copies: what computes has the cores
    from gpu_pool.worker.merging.merging import explain, merge  # imports torch, which reads the environment set above

    try:
        progress = merge(
            start.merge,
            Path(start.staging_path),
            lambda progress: send(JobProgress(job_id=start.job_id, progress=progress)),
        )
        send(MergeDone(job_id=start.job_id, progress=progress))
    except Exception as error:
        import traceback

        traceback.print_exc()
        send(JobFailed(job_id=start.job_id, error=explain(error)))


def obey(connection: Connection[Any, Any]) -> Callable[[FromMerger], None]:
    """Take the server's messages in a thread, which ends the process with them; returns how to answer from any one."""
    sending = threading.Lock()

    def send(message: FromMerger) -> None:
        with sending:
            connection.send_bytes(encode(message))

    def take() -> None:
        try:
            while isinstance(decode_to_merger(connection.recv_bytes(MAX_MESSAGE_BYTES)), Ping):
                send(Alive())
        finally:
            os._exit(0)

    threading.Thread(target=take, name="control", daemon=True).start()
    return send

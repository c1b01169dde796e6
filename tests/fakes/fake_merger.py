"""A spawn target that merges nothing, but takes its time: until a test says how it ends."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from gpu_pool.child import enter_child
from gpu_pool.messages import JobFailed, JobProgress, MergeDone, MergeStart
from gpu_pool.records import Phase, Progress, TaskProgress
from gpu_pool.worker.merging.entry import obey


def gate_of(output: str | Path) -> Path:
    """The named pipe that holds up the merge into `output`: "done", "fail", "crash" or "die" written into it ends
    that."""
    return Path(f"{output}.gate")


def merger(connection: Connection, start: MergeStart, parent_pid: int) -> None:
    """Half of it is done at once, and left where the merge is prepared."""
    enter_child(parent_pid, start.log_path)
    send = obey(connection)
    staging = Path(start.staging_path)
    staging.mkdir()
    (staging / "half").touch()
    send(JobProgress(job_id=start.job_id, progress=progress(1)))
    match gate_of(start.merge.output_path).read_text():
        case "done":
            staging.rename(start.merge.output_path)
            send(MergeDone(job_id=start.job_id, progress=progress(2)))
        case "fail":
            send(JobFailed(job_id=start.job_id, error="a shard is missing"))
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case _:
            os.kill(os.getpid(), signal.SIGKILL)


def progress(done: int) -> Progress:
    return Progress(phase=Phase.MERGING, tasks={"weights": TaskProgress(done=done, total=2)})

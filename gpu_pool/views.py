"""What the pool shows of itself: its workers and GPUs, the queue, and why a job waits. Frozen values."""

from __future__ import annotations

from gpu_pool.hardware import Gpu
from gpu_pool.records import Record, Worker


class WorkerView(Record, frozen=True, kw_only=True):
    """A worker as the operator sees it."""

    worker: Worker
    pid: int | None
    description: str | None
    """Class, parameters, dtype and attention of the loaded model; None while it loads."""
    memory_bytes: int | None


class GpuView(Record, frozen=True, kw_only=True):
    """A GPU as the operator sees it."""

    gpu: Gpu
    worker_id: str | None
    """The first of `worker_ids`."""
    free: bool
    reason: str | None
    """Why it cannot be leased now, or what is wrong although a worker of ours holds it; None: nothing."""
    worker_ids: tuple[str, ...] = ()
    """Our workers on it, those that have ended and whose memory is not back yet among them."""
    strangers: tuple[tuple[int, int], ...] = ()
    """(pid, bytes used) of processes on it that are not ours."""
    quarantined: bool = False
    """It is not used until an operator releases it."""


class WaitingView(Record, frozen=True, kw_only=True):
    """Why one job waits."""

    job_id: str
    needs: str
    """What it must get before it can start, as people say it."""
    reason: str
    """What there is of that, who holds the rest, what cannot be used and why."""
    starts_in: float | None
    """Seconds until it is expected to start; None where nothing is known to estimate it from."""


class QueueView(Record, frozen=True, kw_only=True):
    """Job ids by place, the next and the oldest first, and how many have ended."""

    queued: tuple[str, ...]
    running: tuple[str, ...]
    completed: int
    failed: int
    cancelled: int

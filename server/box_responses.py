"""Bodies of responses about the box itself: GPUs, worker processes, the response cache."""

from __future__ import annotations

from datetime import date
from typing import Literal

from server.responses import ModelInfo, Response


class GpuProcess(Response, frozen=True, kw_only=True):
    """A process on a GPU."""

    pid: int
    """0: processes that NVML does not list, told by the memory that grows beside workers without jobs."""
    used_bytes: int
    """0 where the driver does not tell."""


class GpuInfo(Response, frozen=True, kw_only=True):
    """One GPU or MIG instance, whether a worker could start on it now, and who is on it."""

    uuid: str
    index: str
    name: str
    total_bytes: int
    free_bytes: int
    utilization_percent: int | None
    temperature_celsius: int | None
    worker_id: str | None
    """The first of `worker_ids`."""
    free: bool
    reason: str | None
    """Why no worker can start on it, or what is wrong although one is on it."""
    worker_ids: list[str]
    """Workers on it, those among them that have ended but whose memory is not back yet."""
    foreign_processes: list[GpuProcess]
    """Processes on it that are not the server's."""
    quarantined: bool
    """Not used until `POST /gpus/{uuid}/release`."""
    lost: bool
    """It cannot compute any more."""


class GpuList(Response, frozen=True, kw_only=True):
    """All GPUs that the server may use."""

    gpus: list[GpuInfo]
    held: int
    """GPUs with workers on them."""
    max_gpus: int | None
    """Most GPUs that the operator lets the server hold; null: no limit."""
    problem: str | None
    """Why there is no GPU to use, or entries of allow_gpus and deny_gpus that name none; null: nothing is wrong."""


class WorkerInfo(Response, frozen=True, kw_only=True):
    """One worker process and the model it holds."""

    worker_id: str
    state: Literal["starting", "idle", "busy", "stopping", "dead"]
    pid: int | None
    slots: list[str]
    jobs: list[str]
    description: str | None
    memory_bytes: int | None
    model: ModelInfo


class WorkerList(Response, frozen=True, kw_only=True):
    """All worker processes."""

    workers: list[WorkerInfo]


class CachedModelInfo(Response, frozen=True, kw_only=True):
    """The answers of one model in the response cache."""

    fingerprint: str
    """Empty: of answers from before models were noted."""
    name: str
    entries: int
    bytes: int
    hits: int
    last_used: date | None


class CacheInfo(Response, frozen=True, kw_only=True):
    """The response cache. `hits`: requests that jobs have been spared since the cache was made."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    models: list[CachedModelInfo]


class CachePruned(Response, frozen=True, kw_only=True):
    """What was deleted, and by how much the file is smaller."""

    deleted_entries: int
    freed_bytes: int

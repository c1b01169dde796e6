"""A pool that runs nothing but keeps its jobs honestly: what the REST face is tested against."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from gpu_pool.errors import (
    GpuNotFound,
    GpuNotQuarantined,
    InvalidRequest,
    JobAlreadyFinished,
    JobNotFound,
    KeyReused,
    ShuttingDown,
)
from gpu_pool.hardware import Gpu
from gpu_pool.history import HistoryEntry
from gpu_pool.merge import plan_merge
from gpu_pool.messages import TaskEntry
from gpu_pool.pool import Pool
from gpu_pool.records import CheckpointType, Evaluation, Job, JobState, ModelArgs, ModelSpec, Worker, WorkerState
from gpu_pool.settings import PoolSettings
from gpu_pool.views import GpuView, QueueView, WaitingView, WorkerView

SPEC = ModelSpec(kind="hf", args=ModelArgs(pretrained="/models/tiny"), fingerprint="ab" * 32)
TASKS = (
    TaskEntry(name="arc_easy", kind="task", output_type="multiple_choice"),
    TaskEntry(name="mmlu", kind="group"),
    TaskEntry(name="piqa", kind="task", output_type="multiple_choice"),
)
GPU = Gpu(uuid="GPU-1", index="0", name="H100", total_bytes=80 << 30, free_bytes=79 << 30, visible_device="0")


T = TypeVar("T")


class FakePool(Pool):
    """Jobs wait in the order of submission until a test moves them on with `change`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = PoolSettings(data_dir=folder, max_gpus=2)  # its response cache is a real one
        self.running = False
        self._quarantined = True
        self._jobs: dict[str, Job] = {}
        self._history: dict[str, list[HistoryEntry]] = {}
        self._trouble: str | None = None
        self._changed = threading.Condition()

    async def start(self) -> None:
        self.running = True

    async def stop(self) -> None:
        self.running = False

    async def submit(self, evaluation: Evaluation, request: dict[str, Any]) -> Job:
        if not self.running:
            raise ShuttingDown
        if unknown := [task for task in evaluation.tasks if task == "arc_esy"]:
            raise InvalidRequest(f"tasks[{evaluation.tasks.index(unknown[0])}]", "no such task", choices=["arc_easy"])
        if key := evaluation.idempotency_key:
            for earlier in self._jobs.values():
                if earlier.idempotency_key == key:
                    if earlier.work != evaluation:
                        raise KeyReused(earlier.id)
                    return earlier
        job = Job(id=str(uuid.uuid4()), work=evaluation, request=request, created_at=datetime.now(UTC))
        self._jobs[job.id] = job
        self._history[job.id] = [_entry("submitted", job)]
        return job

    async def merge(
        self,
        checkpoint: Path,
        output: Path | None,
        kind: CheckpointType,
        request: dict[str, Any],
        **options: int | tuple[str, ...],
    ) -> Job:
        if not self.running:
            raise ShuttingDown
        work = plan_merge(checkpoint, output, kind, (self.folder,), **options)
        for job in self._jobs.values():
            if job.work == work and not job.state.is_final:
                return job
        job = Job(id=str(uuid.uuid4()), work=work, request=request, created_at=datetime.now(UTC))
        with self._changed:
            self._jobs[job.id] = job
            self._history[job.id] = [_entry("submitted", job)]
            self._changed.notify_all()
        return job

    async def merged(self, job_id: str) -> Job:
        await asyncio.to_thread(self.until, lambda: self._jobs[job_id].state.is_final)
        return await self.job(job_id)

    def until(self, ready: Callable[[], T]) -> T:
        """The first true thing that `ready` returns, now or when a merge is submitted or something happens to a job."""
        with self._changed:
            return self._changed.wait_for(ready)

    async def cancel(self, job_id: str) -> Job:
        job = await self.job(job_id)
        if job.state.is_final:
            raise JobAlreadyFinished
        state = JobState.CANCELLED if job.state is JobState.QUEUED else JobState.CANCELLING
        return self.change(job_id, state=state)

    async def job(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise JobNotFound(job_id)
        return self._jobs[job_id]

    async def history(self, job_id: str) -> Sequence[HistoryEntry]:
        await self.job(job_id)
        return self._history[job_id]

    @property
    def trouble(self) -> str | None:
        return self._trouble

    async def jobs(
        self, state: Collection[JobState] | None, limit: int, before: str | None, tags: Sequence[str] = ()
    ) -> list[Job]:
        newest_first = list(reversed(self._jobs.values()))
        if before is not None:
            if before not in self._jobs:
                raise InvalidRequest("cursor", "no such job")
            newest_first = newest_first[newest_first.index(self._jobs[before]) + 1 :]
        found = [job for job in newest_first if state is None or job.state in state]
        return [job for job in found if set(tags) <= set(job.work.tags)][:limit]

    def queue_position(self, job_id: str) -> int | None:
        queued = self._ids(JobState.QUEUED)
        return queued.index(job_id) if job_id in queued else None

    def queue(self) -> QueueView:
        return QueueView(
            queued=self._ids(JobState.QUEUED),
            running=self._ids(JobState.RUNNING, JobState.CANCELLING),
            completed=len(self._ids(JobState.COMPLETED)),
            failed=len(self._ids(JobState.FAILED)),
            cancelled=len(self._ids(JobState.CANCELLED)),
        )

    def queue_size(self) -> int:
        return len(self._ids(JobState.QUEUED))

    def waiting(self, limit: int) -> list[WaitingView]:
        queued = self._ids(JobState.QUEUED)[:limit]
        return [
            WaitingView(job_id=job_id, needs="1 GPU", reason="none is free", starts_in=float(position))
            for position, job_id in enumerate(queued)
        ]

    def why_waits(self, job_id: str) -> WaitingView | None:
        return next((wait for wait in self.waiting(len(self._jobs)) if wait.job_id == job_id), None)

    def eta_seconds(self, job_id: str) -> float | None:
        return 12.5 if self._jobs[job_id].state is JobState.RUNNING else None

    def workers(self) -> list[WorkerView]:
        worker = Worker(id="w1", spec=SPEC, slots=("cpu:0",), state=WorkerState.BUSY, jobs=frozenset({"j"}))
        return [WorkerView(worker=worker, pid=123, description="Llama", memory_bytes=1 << 30)]

    async def gpus(self) -> list[GpuView]:
        return [GpuView(gpu=GPU, worker_id=None, free=True, reason=None), self._second_gpu()]

    def gpu_problem(self) -> str | None:
        return None

    async def release_gpu(self, uuid: str) -> GpuView:
        """GPU-2 is quarantined until then."""
        if uuid not in ("GPU-1", "GPU-2"):
            raise GpuNotFound(uuid, ["GPU-1", "GPU-2"])
        if uuid == "GPU-1" or not self._quarantined:
            raise GpuNotQuarantined(f"GPU {uuid} is not quarantined: there is nothing to release")
        self._quarantined = False
        return self._second_gpu()

    def _second_gpu(self) -> GpuView:
        gpu = msgspec.structs.replace(GPU, uuid="GPU-2", index="1", visible_device="1")
        reason = "It is quarantined: its memory is not back." if self._quarantined else None
        return GpuView(gpu=gpu, worker_id=None, free=reason is None, reason=reason, quarantined=self._quarantined)

    async def catalogue(self) -> tuple[TaskEntry, ...]:
        return TASKS

    def job_dir(self, job_id: str) -> Path:
        return self.folder / job_id

    def change(self, job_id: str, **changes: Any) -> Job:
        """What happens to a job elsewhere; a result brings its scores and samples."""
        if result := changes.get("result"):
            changes = {"metrics": result.metrics, "samples": result.samples} | changes
        before, after = self._jobs[job_id], msgspec.structs.replace(self._jobs[job_id], **changes)
        with self._changed:
            self._jobs[job_id] = after
            self._changed.notify_all()
        if after.state is not before.state:
            event = {JobState.QUEUED: "requeued", JobState.RUNNING: "started"}.get(after.state, after.state.value)
            self._history[job_id].append(_entry(event, after))
        return after

    def _ids(self, *states: JobState) -> tuple[str, ...]:
        return tuple(job.id for job in self._jobs.values() if job.state in states)


def _entry(event: str, job: Job) -> HistoryEntry:
    return HistoryEntry(at=datetime.now(UTC), event=event, state=job.state, attempt=job.attempt, cause=job.error)

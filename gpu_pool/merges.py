"""Merges of checkpoints as jobs: one at a time, each in a process of its own, beside all that the scheduler decides.

A merge computes nothing and holds neither GPU nor evaluator: it reads and writes a disk, and two at once would only
slow each other. So it has a line of its own, in the order in which all jobs wait (`gpu_pool.order`): evaluations cannot
keep it waiting, nor it them.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, assert_never

import msgspec

from gpu_pool import messages as msg
from gpu_pool.errors import JobAlreadyFinished, ShuttingDown
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.losses import Losses
from gpu_pool.merge import NotMergeable, is_merged, remove_staging
from gpu_pool.order import Line, rank
from gpu_pool.post_mortem import PostMortem
from gpu_pool.records import Job, JobState, Merge
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.supervisor import Child
from gpu_pool.transitions import JobEvent
from gpu_pool.views import WaitingView
from gpu_pool.watchdog import Watchdog

logger = logging.getLogger(__name__)

MergerChild = Child[msg.FromMerger]
StartMerger = Callable[[str, Merge, Path], Awaitable[MergerChild]]
"""Starts the process of a job that merges, with its log. Raises OSError."""


class Merges:
    """The line of merges, and the one that runs."""

    def __init__(
        self,
        settings: PoolSettings,
        store: Store,
        jobs: LiveJobs,
        start: StartMerger,
        job_dir: Callable[[str], Path],
    ) -> None:
        self._settings = settings
        self._store = store
        self._jobs = jobs
        self._start = start
        self._job_dir = job_dir
        self._post_mortem = PostMortem()
        self._losses: dict[str, Losses] = {}
        """Of merges that wait or run again."""
        self._line = Line()
        self._running: tuple[str, MergerChild] | None = None
        self._changed = asyncio.Condition()
        """Held while jobs change their state, and told when they have."""
        self._stopping = False

    # ------------------------------------------------------------------ the face

    async def submit(self, merge: Merge, request: dict[str, Any], *, patient: bool = False) -> Job:
        """Make a merge a durable job, or find the one that has not ended and does the same.

        Raises DatabaseUnavailable; when `patient` only when the server ends.
        """
        async with self._changed:
            for job in self._jobs.values():
                if job.state in (JobState.QUEUED, JobState.RUNNING) and _same(job.work, merge):
                    return job
            job = Job(id=str(uuid.uuid4()), work=merge, request=request, created_at=datetime.now(UTC))
            job = self._jobs[job.id] = await self._store.add(job, patient=patient, late=self.recover)
            self._queue(job)
        logger.info("job %s is queued: %s into %s", job.id, merge.shards_path, merge.output_path)
        return job

    async def recover(self, job: Job) -> None:
        """Take up one that is in the store only, which waits, or is settled where it was being cancelled."""
        async with self._changed:
            self._jobs[job.id] = job
            if job.state is JobState.CANCELLING:
                await asyncio.to_thread(remove_staging, _merge(job), job.id)
                await self._jobs.settle(job, JobEvent.RELEASED)
            else:
                self._queue(job)

    async def cancel(self, job_id: str) -> None:
        """Cancel a merge that waits or runs; durable on return. Raises JobAlreadyFinished."""
        async with self._changed:
            job = self._jobs.get(job_id)
            if job is None:
                raise JobAlreadyFinished
            if job.state is JobState.QUEUED:
                self._line.discard(job_id)
                self._losses.pop(job_id, None)
                await asyncio.to_thread(remove_staging, _merge(job), job_id)  # of an attempt of the last run
                await self._jobs.settle(job, JobEvent.CANCEL)
                self._changed.notify_all()
            elif job.state is JobState.RUNNING:
                await self._jobs.change(job, JobEvent.CANCEL)
                if self._running and self._running[0] == job_id:
                    self._running[1].kill("it was cancelled")

    async def ended(self, job_id: str) -> Job:
        """The merge once it has ended, however. Raises JobNotFound, ShuttingDown."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopping or job_id not in self._jobs)
        if job_id in self._jobs:
            raise ShuttingDown
        return await self._store.get(job_id)

    async def ensure(self, merge: Merge, request: dict[str, Any], under_way: Callable[[str], object]) -> None:
        """Return when the output is the merge of the shards as they are now; `under_way` is told which job does it.

        Raises NotMergeable, and what `submit` and `ended` raise.
        """
        if await asyncio.to_thread(is_merged, merge):
            return
        job = await self.submit(merge, request, patient=True)
        under_way(job.id)
        merged_path(await self.ended(job.id))

    def waiting(self, job_id: str) -> WaitingView | None:
        """Why a merge waits; None where it does not, or is no merge."""
        job = self._jobs.get(job_id)
        if job is None or job.state is not JobState.QUEUED or not isinstance(job.work, Merge):
            return None
        reason = f"Job {self._running[0]} is being merged." if self._running else "It is about to start."
        return WaitingView(
            job_id=job_id, needs="its turn: one checkpoint is merged at a time", reason=reason, starts_in=None
        )

    # ------------------------------------------------------------------ one after another

    async def run(self) -> None:
        """Merge what comes, for ever."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: len(self._line) > 0 and not self._stopping)
                entry = self._line.after(None)
                assert entry is not None
                self._line.discard(entry[1])
                job = await self._jobs.start(self._jobs[entry[1]])
                child = await self._begin(job)
            if child is not None:
                await self._follow(job, child)

    async def stop(self) -> None:
        """End the process that runs; its job stays as it is, for the next start. Whoever waits is told."""
        async with self._changed:
            self._stopping = True
            self._changed.notify_all()
            running = self._running
        if running:
            running[1].kill("the server was stopped")
            await asyncio.shield(running[1].gone)
            if (job := self._jobs.get(running[0])) and job.state is JobState.CANCELLING:  # it does not run again
                await asyncio.to_thread(remove_staging, _merge(job), job.id)

    def _queue(self, job: Job) -> None:
        self._line.add(job.id, rank(job.created_at.timestamp(), job.work.priority))
        self._changed.notify_all()

    async def _begin(self, job: Job) -> MergerChild | None:
        try:
            child = await self._start(job.id, _merge(job), self._job_dir(job.id) / "job.log")
        except OSError as error:  # no memory, no descriptors: later there may be
            losses = self._losses.pop(job.id, None)
            await self._lose(job, losses, f"it could not be started: {error}", from_outside=False)
            return None
        self._running = job.id, child
        return child

    async def _follow(self, job: Job, child: MergerChild) -> None:
        """Hear the process of a merge until it is gone, and conclude the job."""
        outcome: msg.MergeDone | msg.JobFailed | None = None
        watchdog = Watchdog(child, self._settings.unresponsive_s)

        async def on_message(message: msg.FromMerger) -> None:
            nonlocal outcome
            match message:
                case msg.JobProgress(job_id=job_id, progress=progress):
                    self._jobs.progressed(job_id, progress, None)
                case msg.MergeDone() | msg.JobFailed():
                    outcome = message
                case msg.Alive():
                    watchdog.alive()
                case _:
                    assert_never(message)

        async def on_death(cause: str) -> None:
            pass

        child.watch(on_message, on_death)
        cause = await asyncio.shield(child.gone)
        if self._stopping:
            return
        await asyncio.to_thread(remove_staging, _merge(job), job.id)
        async with self._changed:
            self._running = None
            from_outside = self._post_mortem.is_from_outside(child)
            await self._conclude(self._jobs[job.id], outcome, cause, from_outside=from_outside)
            self._changed.notify_all()

    async def _conclude(
        self, job: Job, outcome: msg.MergeDone | msg.JobFailed | None, cause: str, *, from_outside: bool
    ) -> None:
        losses = self._losses.pop(job.id, None)
        if job.state is JobState.CANCELLING:
            await self._jobs.settle(job, JobEvent.RELEASED)
            return
        match outcome:
            case msg.MergeDone(progress=progress):
                await self._jobs.settle(job, JobEvent.COMPLETE, progress=progress)
            case msg.JobFailed(error=error):
                await self._jobs.settle(job, JobEvent.FAIL, error)
            case None:
                await self._lose(job, losses, f"the process that merges ended: {cause}", from_outside=from_outside)

    async def _lose(self, job: Job, losses: Losses | None, cause: str, *, from_outside: bool) -> None:
        """The process of a merge is gone: it waits again, or has lost too many."""
        now = time.monotonic()
        losses = (losses or Losses(attempts=job.retries)).and_another(done=0, from_outside=from_outside, now=now)
        if losses.are_too_many(max_attempts=self._settings.max_attempts, max_retries=None, now=now):
            await self._jobs.settle(job, JobEvent.FAIL, f"{cause} ({losses.times})")
        else:
            self._losses[job.id] = losses
            self._queue(await self._jobs.requeue(job, cause, uses_retry=True))


def merged_path(job: Job) -> str:
    """Where a merge that has ended has written. Raises NotMergeable with what went wrong."""
    if job.state is not JobState.COMPLETED:
        raise NotMergeable(job.error or f"the merge, job {job.id}, was {job.state.value}")
    return _merge(job).output_path


def _merge(job: Job) -> Merge:
    assert isinstance(job.work, Merge), f"job {job.id} is no merge"
    return job.work


def _same(work: object, merge: Merge) -> bool:
    """Whether it does the same, however important it is and whatever it is called."""
    return isinstance(work, Merge) and msgspec.structs.replace(work, priority=merge.priority, tags=merge.tags) == merge

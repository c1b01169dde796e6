"""Jobs that have not ended, with live progress. Every change of state is durable before it shows."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from gpu_pool.records import Job, JobState, Progress
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent, advance_job

logger = logging.getLogger(__name__)


class LiveJobs(dict[str, Job]):
    """Job id -> unfinished job, oldest first; a job leaves when it has ended."""

    def __init__(self, store: Store, ended: Mapping[JobState, int]) -> None:
        """`ended` counts the jobs that have ended before."""
        super().__init__()
        self.ended = dict(ended)
        self._store = store
        self._rates: dict[str, tuple[float, int]] = {}
        """Job -> (monotonic seconds, requests done) at its first progress: what estimates are made from."""

    def progressed(self, job_id: str, progress: Progress) -> None:
        """Show progress; it becomes durable when the job ends."""
        if job := self.get(job_id):
            self[job_id] = msgspec.structs.replace(job, progress=progress)
            self._rates.setdefault(job_id, (time.monotonic(), progress.done))

    def eta_seconds(self, job_id: str) -> float | None:
        """Seconds that a running job still needs, from its rate so far; None while there is no rate."""
        job, since = self.get(job_id), self._rates.get(job_id)
        if job is None or job.state is not JobState.RUNNING or job.progress is None or since is None:
            return None
        started, done_then = since
        answered, seconds = job.progress.done - done_then, time.monotonic() - started
        return (job.progress.total - job.progress.done) * seconds / answered if answered > 0 else None

    async def note(self, job: Job, **fields: Any) -> None:
        """Change fields without a change of state."""
        self[job.id] = msgspec.structs.replace(job, **fields)
        await self._store.update(job.id, **fields)

    async def start(self, job: Job) -> Job:
        """The job's next attempt begins: what the last one left is gone."""
        now, attempt = datetime.now(UTC), job.attempt + 1
        blank: dict[str, Any] = {"progress": None, "metrics": {}, "samples": {}, "error": None}
        job = await self.change(job, JobEvent.START, started_at=now, attempt=attempt, **blank)
        await self._store.start_attempt(job.id, attempt, now)
        return job

    async def requeue(self, job: Job, cause: str) -> Job:
        """The attempt is over and the job waits again."""
        await self._store.end_attempt(job.id, job.attempt, datetime.now(UTC), "requeued", cause)
        self._rates.pop(job.id, None)
        logger.warning("job %s goes back to the queue: %s", job.id, cause)
        return await self.change(job, JobEvent.REQUEUE, progress=None)

    async def settle(self, job: Job, event: JobEvent, error: str | None = None, **fields: Any) -> None:
        """Bring a job to its end and let it go."""
        now = datetime.now(UTC)
        fields.setdefault("progress", job.progress)
        ended = await self.change(job, event, completed_at=now, error=error, **fields)
        if job.attempt:
            await self._store.end_attempt(job.id, job.attempt, now, ended.state.value, error)
        if ended.result:
            await self._store.add_scores(job.id, ended.metrics)
        del self[job.id]
        self._rates.pop(job.id, None)
        self.ended[ended.state] = self.ended.get(ended.state, 0) + 1
        logger.info("job %s is %s%s", job.id, ended.state.value, f": {error}" if error else "")

    async def change(self, job: Job, event: JobEvent, **fields: Any) -> Job:
        """Change the state as the table says. Raises InvalidTransition, and RuntimeError when the store disagrees."""
        state = advance_job(job.state, event)
        if not await self._store.change_state(job.id, job.state, state, **fields):
            raise RuntimeError(f"job {job.id} is not {job.state} in the database: is another server using it?")
        live = self[job.id]  # progress may have arrived meanwhile
        self[job.id] = msgspec.structs.replace(live, state=state, **fields)
        return self[job.id]

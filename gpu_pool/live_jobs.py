"""Jobs that have not ended, with live progress. Every change of state is durable before it shows."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import msgspec

from gpu_pool.history import Attempt, HistoryEntry
from gpu_pool.order import Line, rank
from gpu_pool.records import Job, JobState, ModelSpec, Progress
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent, advance_job

_BLANK: Mapping[str, Any] = MappingProxyType({"progress": None, "metrics": {}, "samples": {}})
"""Of a job of which no attempt has done anything, or whose last one does not count any more."""

logger = logging.getLogger(__name__)


class LiveJobs(dict[str, Job]):
    """Job id -> unfinished job, oldest first; a job leaves when it has ended."""

    def __init__(self, store: Store, ended: Mapping[JobState, int]) -> None:
        """`ended` counts the jobs that have ended before."""
        super().__init__()
        self.ended = dict(ended)
        self.queued = Line()
        """Those that wait, the next one first."""
        self.active: dict[str, None] = {}
        """Those that run or are being cancelled, in the order in which they started."""
        self._store = store
        self._locks: dict[str, asyncio.Lock] = {}
        self._rates: dict[str, tuple[float, int]] = {}
        """Job -> (seconds that it had a worker, requests done) at its first answers: what estimates are made from."""

    def __setitem__(self, job_id: str, job: Job) -> None:
        """Note what is known of a job, and its place in the queue."""
        super().__setitem__(job_id, job)
        if job.state is JobState.QUEUED and job_id not in self.queued:
            self.active.pop(job_id, None)
            self.queued.add(job_id, rank(job.created_at.timestamp(), job.work.priority))
        elif job.state is not JobState.QUEUED:
            self.queued.discard(job_id)
            self.active[job_id] = None

    def __delitem__(self, job_id: str) -> None:
        super().__delitem__(job_id)
        self.queued.discard(job_id)
        self.active.pop(job_id, None)
        self._locks.pop(job_id, None)

    def progressed(self, job_id: str, progress: Progress, ran_s: float | None) -> None:
        """Show progress, made in so many seconds with a worker; it becomes durable when the job ends."""
        if job := self.get(job_id):
            if progress.waits_for and progress.waits_for != waits_for(job):
                logger.error("job %s waits: %s", job_id, progress.waits_for)
            self[job_id] = msgspec.structs.replace(job, progress=progress)
            if ran_s is not None and progress.workers:
                self._rates.setdefault(job_id, (ran_s, progress.done))

    @property
    def trouble(self) -> str | None:
        """What the first running job that cannot go on waits for."""
        reasons = ((job_id, waits_for(self[job_id])) for job_id in self.active)
        return next((f"job {job_id} waits: {reason}" for job_id, reason in reasons if reason), None)

    def eta_seconds(self, job_id: str, ran_s: float | None) -> float | None:
        """Seconds with a worker that a running job still needs, from its rate so far; None while there is no rate.

        `ran_s`: how long it had a worker by now. None, as nobody knows for how long, while it has none.
        """
        job, since = self.get(job_id), self._rates.get(job_id)
        if job is None or job.state is not JobState.RUNNING or job.progress is None or since is None or ran_s is None:
            return None
        ran_then_s, done_then = since
        answered, seconds = job.progress.done - done_then, ran_s - ran_then_s
        return (job.progress.total - job.progress.done) * seconds / answered if answered > 0 else None

    def identified(self, job_id: str, model: ModelSpec) -> None:
        """A waiting job's model is known; it becomes durable when the job starts, and is found anew after a restart."""
        if job := self.get(job_id):
            self[job_id] = msgspec.structs.replace(job, model=model)

    def note(self, job: Job, **fields: Any) -> Coroutine[Any, Any, None]:
        """Change fields without a change of state: they show at once, and are durable when what is returned is done.

        That raises DatabaseUnavailable when the server ends meanwhile.
        """
        self[job.id] = msgspec.structs.replace(job, **fields)
        return self._write(job.id, fields)

    async def _write(self, job_id: str, fields: dict[str, Any]) -> None:
        async with self._writing(job_id):
            await self._store.update(job_id, **fields)

    def _writing(self, job_id: str) -> asyncio.Lock:
        """Held while a job is written: what an attempt left must not be written after its end."""
        return self._locks.setdefault(job_id, asyncio.Lock())

    async def note_loss(self, job: Job, cause: str) -> None:
        """The job lost a worker, which is part of its history and changes nothing else. Raises DatabaseUnavailable."""
        await self._note_event(job, "worker_lost", cause)

    async def note_other_model(self, job: Job, fingerprint: str) -> None:
        """The files of its model are others than in its last attempt, so its next one evaluates another model.

        Part of its history, which changes nothing else. Raises DatabaseUnavailable.
        """
        assert job.model is not None
        cause = f"attempt {job.attempt} was on {job.model.fingerprint}, and its model is {fingerprint} now"
        await self._note_event(job, "model_changed", cause)

    async def _note_event(self, job: Job, event: str, cause: str) -> None:
        at = datetime.now(UTC)
        entry = HistoryEntry(at=at, event=event, state=job.state, attempt=job.attempt, cause=cause)
        await self._store.note(job.id, entry)

    async def start(self, job: Job) -> Job:
        """The job's next attempt begins."""
        attempt = Attempt(number=job.attempt + 1, started_at=datetime.now(UTC))
        fields: dict[str, Any] = {"started_at": attempt.started_at, "attempt": attempt.number, "model": job.model}
        return await self.change(job, JobEvent.START, attempt, **fields, **_BLANK, error=None)

    async def requeue(self, job: Job, cause: str, *, uses_retry: bool = False) -> Job:
        """The attempt is over, with what it had, and the job waits again; losing its processes uses up a retry, a stop
        does not."""
        self._rates.pop(job.id, None)
        logger.warning("job %s goes back to the queue: %s", job.id, cause)
        fields: dict[str, Any] = {"retries": job.retries + uses_retry, **_BLANK}
        return await self.change(job, JobEvent.REQUEUE, _ended(job, "requeued", cause), cause=cause, **fields)

    async def settle(self, job: Job, event: JobEvent, error: str | None = None, **fields: Any) -> None:
        """Bring a job to its end and let it go."""
        state = advance_job(job.state, event)
        attempt = None if job.state is JobState.QUEUED else _ended(job, state.value, error)
        known: dict[str, Any] = {"model": job.model, "progress": job.progress}
        ending: dict[str, Any] = {"completed_at": datetime.now(UTC), "error": error}
        await self.change(job, event, attempt, cause=error, **ending | known | fields)
        self.ended[state] = self.ended.get(state, 0) + 1
        del self[job.id]
        self._rates.pop(job.id, None)
        logger.info("job %s is %s%s", job.id, state.value, f": {error}" if error else "")

    def forget(self, deleted: Mapping[JobState, int]) -> None:
        """Jobs that have ended are deleted: so many in each state."""
        for state, count in deleted.items():
            self.ended[state] = self.ended.get(state, 0) - count

    async def change(
        self, job: Job, event: JobEvent, record: Attempt | None = None, *, cause: str | None = None, **fields: Any
    ) -> Job:
        """Change the state as the table says, and write with it the `record` of an attempt that begins or ends.

        Returns when it is durable, however long the database is locked or full. Raises InvalidTransition, RuntimeError
        when the store disagrees, and DatabaseUnavailable when the server ends meanwhile.
        """
        state = advance_job(job.state, event)
        async with self._writing(job.id):
            changed = await self._store.change_state(job.id, job.state, state, record, cause=cause, **fields)
        if not changed:
            raise RuntimeError(f"job {job.id} is not {job.state} in the database: is another server using it?")
        live = self[job.id]  # progress may have arrived meanwhile
        self[job.id] = msgspec.structs.replace(live, state=state, **fields)
        return self[job.id]


def waits_for(job: Job) -> str | None:
    """What a running job cannot go on without, as its process says."""
    return job.progress.waits_for if job.progress and job.state is JobState.RUNNING else None


def _ended(job: Job, outcome: str, cause: str | None) -> Attempt:
    """The end of the attempt that the job is in."""
    return Attempt(
        number=job.attempt, started_at=job.started_at, ended_at=datetime.now(UTC), outcome=outcome, cause=cause
    )

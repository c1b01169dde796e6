"""Durable jobs, their history, attempts and scores: SQLAlchemy Core, the same on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, Unpack

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from gpu_pool.database import PATIENCE_SECONDS, Database
from gpu_pool.errors import DatabaseUnavailable, JobNotFound
from gpu_pool.history import Attempt, HistoryEntry
from gpu_pool.job_pages import page_of_ids
from gpu_pool.late_commits import LateCommits, TakeUp
from gpu_pool.records import Job, JobResult, JobState, ModelSpec, Progress
from gpu_pool.tables import (
    attempts,
    history_entry_from,
    job_events,
    job_from,
    job_tags,
    jobs,
    score_rows,
    scores,
)

MOST_ENDED = 1000
"""How many jobs in a final state are kept in memory once read: several pages, some megabytes."""
_UNKNOWN = "Whether the job was taken in, GET /jobs will show; to ask again is safe with an idempotency_key"
_NO_JOBS: Mapping[str, Job] = MappingProxyType({})
_EVENT_OF = {JobState.QUEUED: "requeued", JobState.RUNNING: "started"}
"""What a change to that state is called in the history; the others go by the state's name."""

# Statements are made once: SQLAlchemy takes longer to make one and to find its text than SQLite takes to run it.
_ADD = sa.insert(jobs).returning(jobs.c.sequence)
_ADD_TAGS = sa.insert(job_tags)
_ADD_EVENT = sa.insert(job_events)
_HISTORY = sa.select(job_events).where(job_events.c.job_id == sa.bindparam("job")).order_by(job_events.c.sequence)
_UPDATE = sa.update(jobs).where(jobs.c.id == sa.bindparam("job")).returning(jobs.c.attempt)
_CHANGE_STATE = _UPDATE.where(jobs.c.state == sa.bindparam("old"))
_START_ATTEMPT = sa.insert(attempts)
_END_ATTEMPT = sa.update(attempts).where(
    attempts.c.job_id == sa.bindparam("job"), attempts.c.number == sa.bindparam("attempt")
)
_REMOVE_SCORES = sa.delete(scores).where(
    scores.c.job_id == sa.bindparam("job"), scores.c.task.in_(sa.bindparam("tasks", expanding=True))
)
_ADD_SCORES = sa.insert(scores)
_READ = sa.select(jobs).where(jobs.c.id.in_(sa.bindparam("job_ids", expanding=True)))
_READ_BY_KEY = sa.select(jobs).where(jobs.c.idempotency_key == sa.bindparam("key"))
_UNFINISHED = (
    sa.select(jobs)
    .where(jobs.c.state.in_([state for state in JobState if not state.is_final]))
    .order_by(jobs.c.sequence)
)
_COUNTS = sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)
_COUNT_ENDED = sa.select(sa.func.count()).where(jobs.c.completed_at.is_not(None))
_OLDEST_ENDED = (
    sa.select(jobs.c.id, jobs.c.completed_at)
    .where(jobs.c.completed_at.is_not(None))
    .order_by(jobs.c.completed_at, jobs.c.sequence)
    .limit(sa.bindparam("most", type_=sa.Integer))
)
_DELETE = (
    sa.delete(jobs).where(jobs.c.id.in_(sa.bindparam("job_ids", expanding=True))).returning(jobs.c.id, jobs.c.state)
)


class JobFields(TypedDict, total=False):
    """What may be written to a job that exists."""

    started_at: datetime | None
    completed_at: datetime | None
    error: str | None
    attempt: int
    retries: int
    model: ModelSpec | None
    progress: Progress | None
    metrics: dict[str, dict[str, Any]]
    samples: dict[str, str]
    result: JobResult | None


class Store:
    """The database. Open it with `await Store.open(path)`; every method is one transaction.

    All raise DatabaseUnavailable; changes of jobs that exist only after `give_up`, until then they are tried again.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._ended: dict[str, Job] = {}
        """Job id -> job, of jobs in a final state that were read lately: they are read again and again, and rest.

        Changed within transactions only, and so in their order.
        """
        self._late = LateCommits(self._look)

    @classmethod
    async def open(cls, database: Path | str, *, alone: bool = False) -> Store:
        """Open (or create) and migrate a SQLite file, or what a URL names; `alone`: no other may have it so.

        Raises DatabaseInUse, DatabaseTooNew, DatabaseUnavailable, and PoolError for what is no usable database.
        """
        return cls(await Database.open(database, alone=alone))

    @property
    def trouble(self) -> str | None:
        """Why the database cannot be used, while something waits for it."""
        return self._database.trouble

    async def look(self) -> None:
        """Notice what was done to the database from outside while nothing is written."""
        await self._database.look()

    def give_up(self) -> None:
        """From now on nothing is tried again: the server ends."""
        self._database.give_up()

    async def close(self) -> None:
        """Finish what was begun and close the database."""
        await self._late.close()
        await self._database.close()

    async def add(self, job: Job, *, patient: bool = False, late: TakeUp | None = None) -> Job:
        """Make a new job durable; returns it, or the job that has its idempotency key already.

        Raises DatabaseUnavailable soon, as somebody waits for the answer; when `patient` only after `give_up`. Where it
        is not known then whether the job was written, `late` gets it as soon as it is found here.
        """
        tried = False

        def insert(connection: sa.Connection) -> None:
            nonlocal tried
            _insert(connection, job)
            tried = True

        try:
            await self._database.transaction(insert, patience_s=None if patient else PATIENCE_SECONDS)
        except DatabaseUnavailable as error:
            if not tried or late is None:
                raise
            self._late.look_for(job.id, late)
            raise DatabaseUnavailable(error.reason, _UNKNOWN) from error
        except IntegrityError:
            earlier = await self.by_key(job.idempotency_key) or (await self._found([job.id])).get(job.id)
            if earlier is None:
                raise
            return earlier  # with its own id where a commit was lost sight of and tried again
        return job

    async def by_key(self, idempotency_key: str | None) -> Job | None:
        """The job with that key."""
        if idempotency_key is None:
            return None
        values = {"key": idempotency_key}
        row = await self._database.read(lambda connection: connection.execute(_READ_BY_KEY, values).first())
        job = job_from(row) if row else None
        await self._late.seen(job)
        return job

    async def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        if job := self._ended.get(job_id):
            return job
        found = await self._found([job_id])
        if job_id not in found:
            raise JobNotFound(job_id)
        return found[job_id]

    async def list(
        self,
        state: JobState | Collection[JobState] | None,
        limit: int,
        before: str | None = None,
        live: Mapping[str, Job] = _NO_JOBS,
        tags: Sequence[str] = (),
    ) -> list[Job]:
        """At most `limit` jobs, newest first, in any of the states (None: all), with all of the `tags`.

        Only those older than the job `before`. Those in `live` are taken from there. Raises InvalidRequest when there
        is no job `before`.
        """
        states = {state} if isinstance(state, JobState) else state
        page = await self._database.read(lambda connection: page_of_ids(connection, states, tags, limit, before))
        known = {job_id: jobs[job_id] for jobs in (self._ended.copy(), live) for job_id in page if job_id in jobs}
        if unread := [job_id for job_id in page if job_id not in known]:
            known |= await self._found(unread)
        return [known[job_id] for job_id in page if job_id in known]  # one may have been deleted meanwhile

    async def history(self, job_id: str) -> Sequence[HistoryEntry]:
        """What happened to the job, in order; nothing when there is no such job."""
        return await self._database.read(
            lambda connection: [history_entry_from(row) for row in connection.execute(_HISTORY, {"job": job_id})]
        )

    async def _found(self, job_ids: Sequence[str]) -> dict[str, Job]:
        return await self._database.read(lambda connection: self._read(connection, job_ids))

    async def _look(self, job_id: str) -> Job | None:
        """The job, if there is one, whenever the database can be used again."""
        found = await self._database.transaction(lambda connection: self._read(connection, [job_id]), patience_s=None)
        return found.get(job_id)

    def _read(self, connection: sa.Connection, job_ids: Sequence[str]) -> dict[str, Job]:
        """Those of the jobs that exist, by id."""
        found = {row.id: job_from(row) for row in connection.execute(_READ, {"job_ids": job_ids})}
        self._ended |= {job_id: job for job_id, job in found.items() if job.state.is_final}
        for job_id in list(self._ended)[:-MOST_ENDED]:
            del self._ended[job_id]
        return found

    async def unfinished(self) -> list[Job]:
        """All jobs that are not in a final state, oldest first."""
        return await self._database.read(lambda connection: [job_from(row) for row in connection.execute(_UNFINISHED)])

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        rows = await self._database.read(lambda connection: connection.execute(_COUNTS).all())
        found = {JobState(state): count for state, count in rows}
        return {state: found.get(state, 0) for state in JobState}

    async def change_state(
        self,
        job_id: str,
        old: JobState,
        new: JobState,
        record: Attempt | None = None,
        *,
        cause: str | None = None,
        **fields: Unpack[JobFields],
    ) -> bool:
        """Move the job from `old` to `new`, and write with it `fields` and the `record` of an attempt, new or ended.

        The change, with its `cause`, becomes part of the job's history. Of several that try at once exactly one wins,
        and is told so by True. Whether the change is allowed is for `gpu_pool.transitions` to say.
        """
        at = datetime.now(UTC)
        tried = False

        def change(connection: sa.Connection) -> bool:
            nonlocal tried
            again, tried = tried, True
            attempt = self._write(connection, _CHANGE_STATE, job_id, old=old, state=new, **fields)
            if attempt is None:  # after a commit that was lost sight of, it is our own change that is in the way
                return again and any(row.at == at for row in connection.execute(_HISTORY, {"job": job_id}))
            if record:
                _write_attempt(connection, job_id, record)
            event = _EVENT_OF.get(new, new.value)
            _write_event(connection, job_id, HistoryEntry(at=at, event=event, state=new, attempt=attempt, cause=cause))
            return True

        return await self._database.transaction(change, patience_s=None)

    async def update(self, job_id: str, **fields: Unpack[JobFields]) -> None:
        """Write `fields`, whatever the state. Raises JobNotFound."""

        def change(connection: sa.Connection) -> bool:
            return self._write(connection, _UPDATE, job_id, **fields) is not None

        if not await self._database.transaction(change, patience_s=None):
            raise JobNotFound(job_id)

    async def note(self, job_id: str, entry: HistoryEntry) -> None:
        """Add to a job's history what did not change its state. Nothing is written when there is no such job."""

        def note(connection: sa.Connection) -> None:
            known = [history_entry_from(row) for row in connection.execute(_HISTORY, {"job": job_id})]
            if known and entry not in known:  # it is there after a commit that was lost sight of
                _write_event(connection, job_id, entry)

        await self._database.transaction(note, patience_s=None)

    async def expired(self, before: datetime | None, most: int | None, limit: int) -> list[str]:
        """At most `limit` ids of the jobs that ended longest ago: before `before`, or more than `most` ended since."""

        def oldest(connection: sa.Connection) -> list[str]:
            surplus = 0 if most is None else (connection.scalar(_COUNT_ENDED) or 0) - most
            rows = connection.execute(_OLDEST_ENDED, {"most": limit}).all()
            return [
                row.id
                for number, row in enumerate(rows)
                if number < surplus or (before is not None and row.completed_at < before)
            ]

        return await self._database.read(oldest)

    async def delete(self, job_ids: Sequence[str]) -> dict[JobState, int]:
        """Delete jobs with all that belongs to them; returns how many there were in each state."""

        def delete(connection: sa.Connection) -> dict[JobState, int]:
            deleted = Counter(JobState(row.state) for row in connection.execute(_DELETE, {"job_ids": job_ids}))
            for job_id in job_ids:
                self._ended.pop(job_id, None)
            return dict(deleted)

        return await self._database.transaction(delete)

    def _write(self, connection: sa.Connection, change: sa.Executable, job_id: str, **values: Any) -> int | None:
        """Carry out a `change` of one job; the scores of a result become rows too.

        Returns the job's attempt, or None when there is no such job.
        """
        self._ended.pop(job_id, None)
        row = connection.execute(change, {"job": job_id, **values}).first()
        if row is None:
            return None
        if result := values.get("result"):
            _write_scores(connection, job_id, result.metrics)
        return row.attempt


def _insert(connection: sa.Connection, job: Job) -> None:
    values = {name: getattr(job, name) for name in job.__struct_fields__}
    sequence = connection.scalar(_ADD, values | {"idempotency_key": job.idempotency_key})
    if tags := job.work.tags:
        connection.execute(_ADD_TAGS, [{"tag": tag, "sequence": sequence} for tag in tags])
    submitted = HistoryEntry(at=job.created_at, event="submitted", state=job.state, attempt=job.attempt)
    _write_event(connection, job.id, submitted)


def _write_event(connection: sa.Connection, job_id: str, entry: HistoryEntry) -> None:
    values = {name: getattr(entry, name) for name in entry.__struct_fields__}
    connection.execute(_ADD_EVENT, {"job_id": job_id, **values})


def _write_attempt(connection: sa.Connection, job_id: str, attempt: Attempt) -> None:
    if attempt.ended_at is None:
        values = {"job_id": job_id, "number": attempt.number, "started_at": attempt.started_at}
        connection.execute(_START_ATTEMPT, values)
    else:
        end = {"ended_at": attempt.ended_at, "outcome": attempt.outcome, "cause": attempt.cause}
        connection.execute(_END_ATTEMPT, {"job": job_id, "attempt": attempt.number, **end})


def _write_scores(connection: sa.Connection, job_id: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Keep the scores of these tasks, in place of what was kept of them before."""
    connection.execute(_REMOVE_SCORES, {"job": job_id, "tasks": list(metrics)})
    if rows := [row for task, scores in metrics.items() for row in score_rows(job_id, task, scores)]:
        connection.execute(_ADD_SCORES, rows)

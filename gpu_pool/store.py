"""Durable jobs, attempts and scores: SQLAlchemy Core, on SQLite by default and unchanged on PostgreSQL."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

import msgspec
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection, Dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from gpu_pool.errors import InvalidRequest, JobNotFound
from gpu_pool.records import Evaluation, Job, JobResult, JobState, ModelSpec, Progress

_BUSY_TIMEOUT_MS = 10_000  # another process (a backup, a person with sqlite3) may hold the file this long


class _Utc(sa.TypeDecorator[datetime]):
    """An aware datetime; SQLite keeps no zone, so UTC is what is written and read there."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class _Message(sa.TypeDecorator[str]):
    """Text for people, of any origin: what no database can hold (NUL, lone surrogates) is replaced."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value.encode("utf-8", "replace").decode().replace("\0", "�") if value else value


_JSON = sa.JSON(none_as_null=True)
_metadata = sa.MetaData()
_jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("id", sa.String),
    sa.Column("state", sa.String),
    sa.Column("created_at", _Utc),
    sa.Column("started_at", _Utc),
    sa.Column("completed_at", _Utc),
    sa.Column("attempt", sa.Integer),
    sa.Column("evaluation", _JSON),
    sa.Column("request", _JSON),
    sa.Column("error", _Message),
    sa.Column("model", _JSON),
    sa.Column("progress", _JSON),
    sa.Column("metrics", _JSON),
    sa.Column("samples", _JSON),
    sa.Column("result", _JSON),
)
_attempts = sa.Table(
    "attempts",
    _metadata,
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("started_at", _Utc),
    sa.Column("ended_at", _Utc),
    sa.Column("outcome", sa.String),
    sa.Column("cause", _Message),
)
_scores = sa.Table(
    "scores",
    _metadata,
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("metric", sa.String, primary_key=True),
    sa.Column("value", sa.Float),
    sa.Column("stderr", sa.Float),
)


class JobFields(TypedDict, total=False):
    """What may be written to a job that exists."""

    started_at: datetime | None
    completed_at: datetime | None
    error: str | None
    attempt: int
    model: ModelSpec | None
    progress: Progress | None
    metrics: dict[str, dict[str, Any]]
    samples: dict[str, str]
    result: JobResult | None


class Store:
    """The database. Open it with `await Store.open(path)`; every method is one transaction."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, database: Path | str) -> Store:
        """Open (or create) and migrate a SQLite file, or what an SQLAlchemy URL names."""
        engine = _sqlite_engine(database) if isinstance(database, Path) else _engine(database)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_migrate)
        except BaseException:
            await engine.dispose()
            raise
        return cls(engine)

    async def close(self) -> None:
        await self._engine.dispose()

    async def add(self, job: Job) -> None:
        """Make a new job durable."""
        values = {name: getattr(job, name) for name in job.__struct_fields__}
        async with self._engine.begin() as connection:
            await connection.execute(sa.insert(_jobs).values(values))

    async def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        async with self._engine.connect() as connection:
            row = (await connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id))).first()
        if row is None:
            raise JobNotFound(job_id)
        return _job(row)

    async def list(
        self, state: JobState | Collection[JobState] | None, limit: int, before: str | None = None
    ) -> list[Job]:
        """At most `limit` jobs, newest first, in any of the states (None: all), older than the job `before`.

        Raises InvalidRequest when there is no job `before`.
        """
        page = sa.select(_jobs).order_by(_jobs.c.sequence.desc()).limit(limit)
        async with self._engine.connect() as connection:
            if before is not None:
                page = page.where(_jobs.c.sequence < await _sequence(connection, before))
            if state is None:
                rows = (await connection.execute(page)).all()
            else:
                # One indexed query a state: for `state IN (…)` databases sort every match before they cut.
                states = {state} if isinstance(state, JobState) else set(state)
                pages = [await connection.execute(page.where(_jobs.c.state == one)) for one in states]
                rows = sorted((row for each in pages for row in each), key=lambda row: row.sequence, reverse=True)
        return [_job(row) for row in rows[:limit]]

    async def unfinished(self) -> list[Job]:
        """All jobs that are not in a final state, oldest first."""
        states = [state for state in JobState if not state.is_final]
        query = sa.select(_jobs).where(_jobs.c.state.in_(states)).order_by(_jobs.c.sequence)
        async with self._engine.connect() as connection:
            return [_job(row) for row in await connection.execute(query)]

    async def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        query = sa.select(_jobs.c.state, sa.func.count()).group_by(_jobs.c.state)
        async with self._engine.connect() as connection:
            found = {JobState(state): count for state, count in await connection.execute(query)}
        return {state: found.get(state, 0) for state in JobState}

    async def change_state(self, job_id: str, old: JobState, new: JobState, **fields: Unpack[JobFields]) -> bool:
        """Move the job from `old` to `new` and write `fields` with it.

        Of several that try at once exactly one wins, and is told so by True. Whether the change is allowed is for
        `gpu_pool.transitions` to say.
        """
        change = (
            sa.update(_jobs)
            .where(_jobs.c.id == job_id, _jobs.c.state == old)
            .values(state=new, **fields)
            .returning(_jobs.c.sequence)
        )
        async with self._engine.begin() as connection:
            return (await connection.execute(change)).first() is not None

    async def update(self, job_id: str, **fields: Unpack[JobFields]) -> None:
        """Write `fields`, whatever the state. Raises JobNotFound."""
        change = sa.update(_jobs).where(_jobs.c.id == job_id).values(**fields).returning(_jobs.c.sequence)
        async with self._engine.begin() as connection:
            if (await connection.execute(change)).first() is None:
                raise JobNotFound(job_id)

    async def start_attempt(self, job_id: str, number: int, at: datetime) -> None:
        """Record that the job's processes were started for the `number`th time."""
        async with self._engine.begin() as connection:
            await connection.execute(sa.insert(_attempts).values(job_id=job_id, number=number, started_at=at))

    async def end_attempt(self, job_id: str, number: int, at: datetime, outcome: str, cause: str | None) -> None:
        """Record how an attempt ended: one word, and for people why."""
        change = sa.update(_attempts).where(_attempts.c.job_id == job_id, _attempts.c.number == number)
        async with self._engine.begin() as connection:
            await connection.execute(change.values(ended_at=at, outcome=outcome, cause=cause))

    async def add_scores(self, job_id: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the scores of these tasks, in place of what was kept of them before."""
        rows = [row for task, scores in metrics.items() for row in _score_rows(job_id, task, scores)]
        old = sa.delete(_scores).where(_scores.c.job_id == job_id, _scores.c.task.in_(list(metrics)))
        async with self._engine.begin() as connection:
            await connection.execute(old)
            if rows:
                await connection.execute(sa.insert(_scores), rows)


def _engine(url: str | sa.URL, **options: Any) -> AsyncEngine:
    return create_async_engine(
        url,
        json_serializer=lambda value: msgspec.json.encode(value).decode(),  # pyright: ignore[reportUnknownLambdaType]
        json_deserializer=msgspec.json.decode,
        **options,
    )


def _sqlite_engine(path: Path) -> AsyncEngine:
    """One connection: SQLite has one writer anyway, and waiting for it here costs no busy timeouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    url = sa.URL.create("sqlite+aiosqlite", database=str(path.absolute()))
    engine = _engine(url, pool_size=1, max_overflow=0)
    event.listen(engine.sync_engine, "connect", _configure_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: DBAPIConnection, record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN would leave DDL outside the transaction
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _migrate(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", "gpu_pool:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _sequence(connection: AsyncConnection, job_id: str) -> int:
    sequence = await connection.scalar(sa.select(_jobs.c.sequence).where(_jobs.c.id == job_id))
    if sequence is None:
        raise InvalidRequest("cursor", f"must be the id of a job that exists; there is no job {job_id}")
    return sequence


def _job(row: sa.Row[Any]) -> Job:
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]  (SQLAlchemy's public name for it)
    del values["sequence"]
    values["state"] = JobState(row.state)
    values["evaluation"] = msgspec.convert(row.evaluation, Evaluation)
    values["model"] = msgspec.convert(row.model, ModelSpec | None)
    values["progress"] = msgspec.convert(row.progress, Progress | None)
    values["result"] = msgspec.convert(row.result, JobResult | None)
    return Job(**values)


def _score_rows(job_id: str, task: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each of lm-eval's "metric,filter" keys that holds a number, with its "metric_stderr,filter"."""
    rows: list[dict[str, Any]] = []
    for key, value in scores.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value):
            continue
        stderr = scores.get(f"{name}_stderr,{filter_name}")
        row = {"job_id": job_id, "task": task, "metric": key, "value": value}
        rows.append(row | {"stderr": stderr if _is_number(stderr) else None})
    return rows


def _is_number(value: object) -> bool:
    """Whether a database can compare it: lm-eval also says "N/A", and NaN."""
    return isinstance(value, int | float) and not math.isnan(value)

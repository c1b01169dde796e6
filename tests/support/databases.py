"""What tests of the job database share: jobs to keep, and looks past the store: plain SQL on either kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from gpu_pool.engines import database_url
from gpu_pool.records import Evaluation, Job, JobState

NOON = datetime(2026, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)


def make_job(job_id: str, state: JobState = JobState.QUEUED, **fields: Any) -> Job:
    """A job submitted at noon; `fields` are of its evaluation."""
    evaluation = Evaluation(model="hf", tasks=("arc_easy", "piqa"), limit=0.5, gen_kwargs={"until": ["\n"]}, **fields)
    return Job(id=job_id, work=evaluation, request={"model": "hf", "limit": None}, state=state, created_at=NOON)


@contextlib.contextmanager
def connection(database: Path | str) -> Iterator[sa.Connection]:
    """A connection in a transaction of its own, like that of another program."""
    engine = sa.create_engine(database_url(database), poolclass=sa.NullPool)
    with engine.begin() as opened:
        yield opened


def query(database: Path | str, sql: str) -> list[tuple[Any, ...]]:
    with connection(database) as opened:
        return [tuple(row) for row in opened.execute(sa.text(sql))]


def execute(database: Path | str, sql: str) -> None:
    with connection(database) as opened:
        opened.execute(sa.text(sql))


def explain(database: Path | str, statement: sa.Select[Any]) -> str:
    """How the database goes about a statement: on PostgreSQL by indexes where it can, as with many rows."""
    with connection(database) as opened:
        sqlite = opened.dialect.name == "sqlite"
        text = statement.compile(opened, compile_kwargs={"literal_binds": True})
        if not sqlite:
            opened.execute(sa.text("SET LOCAL enable_seqscan = off"))
        rows = opened.execute(sa.text(f"EXPLAIN {'QUERY PLAN ' if sqlite else ''}{text}"))
        return "\n".join(str(row[-1]) for row in rows)

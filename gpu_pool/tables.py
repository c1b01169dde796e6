"""The tables of jobs and of what belongs to them, and what a row means. Made by `gpu_pool.migrations`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine.interfaces import Dialect

from gpu_pool.history import HistoryEntry
from gpu_pool.records import Evaluation, Job, JobResult, JobState, Merge, ModelSpec, Progress


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
jobs = sa.Table(
    "jobs",
    _metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("id", sa.String),
    sa.Column("state", sa.String),
    sa.Column("created_at", _Utc),
    sa.Column("started_at", _Utc),
    sa.Column("completed_at", _Utc),
    sa.Column("attempt", sa.Integer),
    sa.Column("retries", sa.Integer),
    sa.Column("idempotency_key", sa.String),
    sa.Column("work", _JSON),
    sa.Column("request", _JSON),
    sa.Column("error", _Message),
    sa.Column("model", _JSON),
    sa.Column("progress", _JSON),
    sa.Column("metrics", _JSON),
    sa.Column("samples", _JSON),
    sa.Column("result", _JSON),
)
job_tags = sa.Table(
    "job_tags",
    _metadata,
    sa.Column("tag", sa.String, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
)
job_events = sa.Table(
    "job_events",
    _metadata,
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    sa.Column("job_id", sa.String),
    sa.Column("at", _Utc),
    sa.Column("event", sa.String),
    sa.Column("state", sa.String),
    sa.Column("attempt", sa.Integer),
    sa.Column("cause", _Message),
)
attempts = sa.Table(
    "attempts",
    _metadata,
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("started_at", _Utc),
    sa.Column("ended_at", _Utc),
    sa.Column("outcome", sa.String),
    sa.Column("cause", _Message),
)
scores = sa.Table(
    "scores",
    _metadata,
    sa.Column("job_id", sa.String, primary_key=True),
    sa.Column("task", sa.String, primary_key=True),
    sa.Column("metric", sa.String, primary_key=True),
    sa.Column("value", sa.Float),
    sa.Column("stderr", sa.Float),
)


def job_from(row: sa.Row[Any]) -> Job:
    """A row of `jobs` as a Job."""
    values = dict(row._mapping)  # pyright: ignore[reportPrivateUsage]  (SQLAlchemy's public name for it)
    del values["sequence"], values["idempotency_key"]  # a column only to be unique; the evaluation has it too
    values["state"] = JobState(row.state)
    values["work"] = msgspec.convert(row.work, Merge if "checkpoint_path" in row.work else Evaluation)
    values["model"] = msgspec.convert(row.model, ModelSpec | None)
    values["progress"] = msgspec.convert(row.progress, Progress | None)
    values["result"] = msgspec.convert(row.result, JobResult | None)
    return Job(**values)


def history_entry_from(row: sa.Row[Any]) -> HistoryEntry:
    """A row of `job_events` as a HistoryEntry."""
    return HistoryEntry(at=row.at, event=row.event, state=JobState(row.state), attempt=row.attempt, cause=row.cause)


def score_rows(job_id: str, task: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
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

"""What the store keeps beside a job's state: its history, tags, idempotency key and end. On both kinds of database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from databases import NOON, connection, execute, make_job, query

from gpu_pool.database import Database
from gpu_pool.history import HistoryEntry
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.records import JobState
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent


@pytest.fixture
async def store(database: Path | str) -> AsyncIterator[Store]:
    opened = await Store.open(database)
    yield opened
    await opened.close()


async def test_every_change_of_state_is_history(store: Store) -> None:
    live = LiveJobs(store, {})
    live["1"] = await store.add(make_job("1"))
    began = datetime.now(UTC)
    await live.requeue(await live.start(live["1"]), "worker w1 died (signal 9)", uses_retry=True)
    await live.requeue(await live.start(live["1"]), "the server was stopped")
    await live.change(await live.start(live["1"]), JobEvent.CANCEL)
    await live.settle(live["1"], JobEvent.RELEASED)
    history = await store.history("1")
    queued, running = JobState.QUEUED, JobState.RUNNING
    assert [(entry.event, entry.state, entry.attempt, entry.cause) for entry in history] == [
        ("submitted", queued, 0, None),
        ("started", running, 1, None),
        ("requeued", queued, 1, "worker w1 died (signal 9)"),
        ("started", running, 2, None),
        ("requeued", queued, 2, "the server was stopped"),
        ("started", running, 3, None),
        ("cancelling", JobState.CANCELLING, 3, None),
        ("cancelled", JobState.CANCELLED, 3, None),
    ]
    assert history[0].at == NOON
    assert began <= history[1].at <= history[-1].at <= datetime.now(UTC)
    assert (await store.get("1")).retries == 1  # a stop of the server uses none up


async def test_a_failure_is_history_with_its_cause(store: Store) -> None:
    live = LiveJobs(store, {})
    live["1"] = await store.add(make_job("1"))
    await live.settle(live["1"], JobEvent.FAIL, "there is no such model")
    [_, last] = await store.history("1")
    assert last == HistoryEntry(
        at=last.at, event="failed", state=JobState.FAILED, attempt=0, cause="there is no such model"
    )


async def test_a_lost_worker_is_history_of_a_job_that_goes_on(store: Store) -> None:
    live = LiveJobs(store, {})
    live["1"] = await store.add(make_job("1"))
    running = await live.start(live["1"])
    await live.note_loss(running, "worker-4 ended: killed by SIGKILL")
    *_, last = await store.history("1")
    assert last == HistoryEntry(
        at=last.at,
        event="worker_lost",
        state=JobState.RUNNING,
        attempt=1,
        cause="worker-4 ended: killed by SIGKILL",
    )
    await store.note("1", last)  # a commit that was lost sight of is tried again
    await store.note("nobody", last)
    assert len(await store.history("1")) == 3
    assert (live["1"], await store.get("1")) == (running, running)


async def test_a_change_that_did_not_happen_is_no_history(store: Store) -> None:
    await store.add(make_job("1"))
    ends = [JobState.RUNNING, JobState.CANCELLED] * 20
    won = await asyncio.gather(*(store.change_state("1", JobState.QUEUED, new) for new in ends))
    assert [entry.state for entry in await store.history("1")] == [JobState.QUEUED, ends[won.index(True)]]
    assert await store.history("nobody") == []


async def test_pages_of_jobs_with_tags(store: Store) -> None:
    for number in range(12):
        tags = ("even" if number % 2 == 0 else "odd", *(["third"] if number % 3 == 0 else []))
        await store.add(make_job(str(number), JobState.QUEUED if number < 6 else JobState.FAILED, tags=tags))
    await store.add(make_job("none"))

    async def ids(limit: int, before: str | None, *tags: str, state: JobState | None = None) -> list[str]:
        return [job.id for job in await store.list(state, limit, before, tags=tags)]

    assert await ids(3, None, "even") == ["10", "8", "6"]
    assert await ids(9, "6", "even") == ["4", "2", "0"]
    assert await ids(9, None, "third", "even") == await ids(9, None, "even", "third") == ["6", "0"]
    assert await ids(9, None, "third", state=JobState.FAILED) == ["9", "6"]
    assert await ids(9, None, "eve") == []
    assert (await store.get("6")).evaluation.tags == ("even", "third")


async def test_of_many_with_one_key_the_first_is_stored(store: Store, database: Path | str) -> None:
    jobs = [make_job(str(number), idempotency_key="k") for number in range(20)]
    stored = await asyncio.gather(*(store.add(job) for job in jobs))
    assert len({job.id for job in stored}) == 1
    assert query(database, "SELECT count(*) FROM jobs") == [(1,)]
    assert query(database, "SELECT count(*) FROM job_events") == [(1,)]
    other = make_job("other", idempotency_key="k2")
    assert await store.add(other) == other
    assert await store.add(make_job("without")) == make_job("without")
    assert await store.add(make_job("without too")) == make_job("without too")


async def test_a_key_outlives_the_server_and_ends_with_its_job(store: Store, database: Path | str) -> None:
    await store.add(make_job("1", JobState.FAILED, idempotency_key="k"))
    again = await Store.open(database)
    assert (await again.add(make_job("2", idempotency_key="k"))).id == "1"
    found = await again.by_key("k")
    assert found is not None
    assert found.evaluation.idempotency_key == "k"
    assert await again.by_key("l") is None
    assert await again.by_key(None) is None
    await again.delete(["1"])
    assert (await again.add(make_job("2", idempotency_key="k"))).id == "2"
    await again.close()


async def end(store: Store, job_id: str, minutes: int) -> None:
    """The job, with all that may belong to it, ends so many minutes after noon."""
    await store.add(make_job(job_id, JobState.RUNNING, tags=("t",)))
    completed_at = NOON + timedelta(minutes=minutes)
    assert await store.change_state(job_id, JobState.RUNNING, JobState.FAILED, completed_at=completed_at)


async def test_jobs_that_ended_longest_ago_expire_first(store: Store) -> None:
    await store.add(make_job("waiting"))
    for job_id, minutes in (("a", 3), ("b", 1), ("c", 2), ("d", 4)):
        await end(store, job_id, minutes)
    assert await store.expired(None, None, 9) == []
    assert await store.expired(None, 3, 9) == ["b"]
    assert await store.expired(None, 0, 9) == ["b", "c", "a", "d"]
    assert await store.expired(None, 0, 2) == ["b", "c"]
    assert await store.expired(NOON + timedelta(minutes=3), None, 9) == ["b", "c"]
    assert await store.expired(NOON + timedelta(minutes=2), 1, 9) == ["b", "c", "a"]


async def test_a_deleted_job_leaves_nothing(store: Store, database: Path | str) -> None:
    for number in range(3):
        await end(store, str(number), number)
    await store.get("1")
    assert await store.delete(["0", "1", "never"]) == {JobState.FAILED: 2}
    assert [job.id for job in await store.list(None, 9)] == ["2"]
    assert [job.id for job in await store.list(None, 9, tags=("t",))] == ["2"]
    for table in ("jobs", "job_tags"):
        assert query(database, f"SELECT count(*) FROM {table}") == [(1,)]
    assert {row[0] for row in query(database, "SELECT job_id FROM job_events")} == {"2"}


async def test_jobs_from_before_there_was_a_history_have_what_is_known_of_it(database: Path | str) -> None:
    opened = await Database.open(database)
    await opened.close()
    with connection(database) as old:
        for statement in _DOWN:
            old.execute(sa.text(statement))
    execute(database, "UPDATE alembic_version SET version_num = '0001'")
    columns = "id, state, created_at, completed_at, attempt, evaluation, request, metrics, samples, error"
    evaluation = """'{"model": "hf", "tasks": ["a"]}', '{}', '{}', '{}'"""
    execute(
        database,
        f"INSERT INTO jobs ({columns}) VALUES ('1', 'failed', '2026-05-01 12:00:00', '2026-05-01 12:09:00', 2, "
        f"{evaluation}, 'lost')",
    )
    execute(
        database,
        "INSERT INTO attempts VALUES ('1', 1, '2026-05-01 12:01:00', '2026-05-01 12:02:00', 'requeued', 'died'), "
        "('1', 2, '2026-05-01 12:03:00', '2026-05-01 12:09:00', 'failed', 'lost')",
    )
    store = await Store.open(database)
    assert [(entry.event, entry.attempt, entry.cause) for entry in await store.history("1")] == [
        ("submitted", 0, None),
        ("started", 1, None),
        ("requeued", 1, "died"),
        ("started", 2, None),
        ("failed", 2, "lost"),
    ]
    job = await store.get("1")
    assert (job.retries, job.evaluation.tags) == (0, ())
    await store.close()


_DOWN = (
    "ALTER TABLE jobs RENAME COLUMN work TO evaluation",
    "DROP TABLE job_events",
    "DROP TABLE job_tags",
    "DROP INDEX ix_jobs_ended",
    "DROP INDEX ix_jobs_idempotency_key",
    "ALTER TABLE jobs DROP COLUMN retries",
    "ALTER TABLE jobs DROP COLUMN idempotency_key",
)
"""What makes a database of the newest revision one of 0001."""

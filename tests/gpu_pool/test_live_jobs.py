"""Unfinished jobs: what is shown of them while they run and once they have ended."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gpu_pool.live_jobs import LiveJobs
from gpu_pool.records import Evaluation, Job, JobState, ModelArgs, ModelSpec, Progress, TaskProgress
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent


def progress(done: int, *, by: int) -> Progress:
    """So many of 10 requests are done, so many of them by a worker."""
    return Progress(tasks={"t": TaskProgress(done=done, total=10)}, workers={"w": by} if by else {})


async def test_an_estimate_is_for_running_jobs_only(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    evaluation = Evaluation(model="hf", tasks=("t",))
    job = jobs["j"] = Job(id="j", work=evaluation, request={}, created_at=datetime.now(UTC))
    await store.add(job)
    assert jobs.eta_seconds("j", 0.0) is None
    running = await jobs.start(job)
    jobs.progressed("j", progress(1, by=1), 5.0)
    assert jobs.eta_seconds("j", 6.0) is None
    jobs.progressed("j", progress(3, by=3), 7.0)
    assert jobs.eta_seconds("j", 8.0) == 7 * 3.0 / 2
    jobs["j"] = msgspec.structs.replace(jobs["j"], state=JobState.COMPLETED)  # durable, not yet let go
    assert jobs.eta_seconds("j", 8.0) is None
    jobs["j"] = running
    await jobs.settle(running, JobEvent.COMPLETE)
    assert "j" not in jobs
    assert jobs.ended == {JobState.COMPLETED: 1}
    await store.close()


async def test_an_estimate_counts_neither_loading_nor_answers_from_the_cache_nor_pauses(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    job = jobs["j"] = Job(id="j", work=Evaluation(model="hf", tasks=("t",)), request={}, created_at=datetime.now(UTC))
    await store.add(job)
    await jobs.start(job)
    jobs.progressed("j", progress(4, by=0), 0.5)  # from the cache, while the model loads
    jobs.progressed("j", progress(5, by=1), 20.5)
    jobs.progressed("j", progress(7, by=3), 24.5)
    assert jobs.eta_seconds("j", None) is None  # it pauses
    jobs.progressed("j", progress(8, by=4), None)  # what had been on its way
    assert jobs.eta_seconds("j", 26.5) == 2 * 6.0 / 3
    await store.close()


async def test_a_job_is_counted_as_soon_as_it_shows_as_ended(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    job = jobs["j"] = Job(id="j", work=Evaluation(model="hf", tasks=("t",)), request={}, created_at=datetime.now(UTC))
    await store.add(job)
    settling = asyncio.create_task(jobs.settle(await jobs.start(job), JobEvent.COMPLETE))
    while True:
        shown = jobs.get("j")
        assert jobs.ended == ({JobState.COMPLETED: 1} if shown is None or shown.state.is_final else {})
        if settling.done():
            break
        await asyncio.sleep(0)
    assert "j" not in jobs
    assert (await store.get("j")).state is JobState.COMPLETED
    await store.close()


async def test_what_is_known_of_a_job_becomes_durable_when_it_starts_or_ends(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    spec = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f")
    for job_id in ("runs", "cancelled"):
        evaluation = Evaluation(model="hf", tasks=("t",))
        jobs[job_id] = Job(id=job_id, work=evaluation, request={}, created_at=datetime.now(UTC))
        await store.add(jobs[job_id])
        jobs.identified(job_id, spec)
        assert jobs[job_id].model == spec
    jobs.identified("gone", spec)
    await jobs.start(jobs["runs"])
    await jobs.settle(jobs["cancelled"], JobEvent.CANCEL)
    assert await store.get("runs") == jobs["runs"]
    assert (await store.get("cancelled")).model == spec
    assert set(jobs) == {"runs"}
    await store.close()


async def test_an_attempt_stays_as_it_ended(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    evaluation = Evaluation(model="hf", tasks=("t",))
    job = jobs["j"] = Job(id="j", work=evaluation, request={}, created_at=datetime.now(UTC))
    await store.add(job)
    for cause in ("first", "second"):
        await jobs.requeue(await jobs.start(jobs["j"]), cause)
    await jobs.settle(jobs["j"], JobEvent.CANCEL)
    await store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        rows = connection.execute("SELECT number, outcome, cause, ended_at >= started_at FROM attempts").fetchall()
    assert rows == [(1, "requeued", "first", 1), (2, "requeued", "second", 1)]

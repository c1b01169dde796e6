"""The line of merges, with real processes that a test lets end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import fake_merger
import pytest

from gpu_pool.errors import JobAlreadyFinished, ShuttingDown
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.merge import NotMergeable, staging_folder
from gpu_pool.merges import MergerChild, Merges, merged_path
from gpu_pool.messages import MergeStart, decode_from_merger
from gpu_pool.records import Job, JobState, Merge
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.supervisor import spawn
from gpu_pool.transitions import JobEvent

PATIENCE_SECONDS = 120  # a bound for a loaded machine, not an expectation

UNRESPONSIVE_SECONDS = 10.0
"""More than any process needs to start to answer, on a loaded machine."""


class Box:
    """A line of merges into folders of one folder, and what tests do with it."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        self.jobs = LiveJobs(store, {})
        settings = PoolSettings(data_dir=folder, max_attempts=2, unresponsive_s=UNRESPONSIVE_SECONDS)
        self.merges = Merges(settings, store, self.jobs, self.start, lambda job_id: folder / "jobs" / job_id)
        self.task = asyncio.create_task(self.merges.run())
        self.refusals = 0
        """How many processes cannot be started."""

    async def start(self, job_id: str, merge: Merge, log_path: Path) -> MergerChild:
        if self.refusals:
            self.refusals -= 1
            raise OSError("no memory")
        staging = str(staging_folder(merge, job_id))
        start = MergeStart(job_id=job_id, merge=merge, staging_path=staging, log_path=str(log_path))
        self.child = await spawn("merger", fake_merger.merger, start, decode_from_merger)
        return self.child

    def merge(self, name: str, **fields: Any) -> Merge:
        output = self.folder / name
        if not fake_merger.gate_of(output).exists():
            os.mkfifo(fake_merger.gate_of(output))
        paths = {field: str(self.folder) for field in ("checkpoint_path", "shards_path", "description_path")}
        return Merge(output_path=str(output), **paths, **fields)

    async def submit(self, name: str, **fields: Any) -> Job:
        return await self.merges.submit(self.merge(name, **fields), {"checkpoint_path": str(self.folder)})

    async def until(self, job: Job, ready: Callable[[Job], Any]) -> Job:
        """The job, which has not ended, once it is `ready`."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not ready(self.jobs[job.id]):
                await asyncio.sleep(0.01)
        return self.jobs[job.id]

    async def half_done(self, job: Job) -> Job:
        return await self.until(job, lambda job: job.progress and job.progress.done == 1)

    async def say(self, name: str, how: str) -> None:
        """Let the merge into that folder end so."""
        await asyncio.to_thread(fake_merger.gate_of(self.folder / name).write_text, how)

    async def ended(self, job: Job) -> Job:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.merges.ended(job.id)

    def left(self) -> list[Path]:
        """What merges that did not end have left."""
        return list(self.folder.glob(".merging-*"))

    async def close(self) -> None:
        await self.merges.stop()
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def events(self, job: Job) -> list[str]:
        return [entry.event for entry in await self.store.history(job.id)]


@pytest.fixture
async def box(tmp_path: Path) -> AsyncIterator[Box]:
    store = await Store.open(tmp_path / "jobs.sqlite")
    box = Box(tmp_path, store)
    yield box
    await box.close()
    await store.close()


async def test_a_merge_is_a_job_with_progress(box: Box) -> None:
    job = await box.submit("out", tags=("nightly",))
    assert job.state is JobState.QUEUED
    running = await box.half_done(job)
    assert (running.state, running.attempt) == (JobState.RUNNING, 1)
    await box.say("out", "done")
    ended = await box.ended(job)
    assert (ended.state, ended.progress, ended.error) == (JobState.COMPLETED, fake_merger.progress(2), None)
    assert merged_path(ended) == str(box.folder / "out")
    assert (box.folder / "out" / "half").exists()
    assert await box.events(job) == ["submitted", "started", "completed"]
    assert [job.id for job in await box.store.list(None, 9, tags=["nightly"])] == [job.id]


async def test_one_at_a_time_the_most_important_first(box: Box) -> None:
    first, second, third = [await box.submit(name, priority=p) for name, p in (("a", 0), ("b", 0), ("c", 5))]
    await box.half_done(first)
    for waiting in (second, third):
        view = box.merges.waiting(waiting.id)
        assert view is not None
        assert view.reason == f"Job {first.id} is being merged."
    assert list(box.jobs.queued) == [third.id, second.id]
    for name, job in (("a", first), ("c", third), ("b", second)):
        await box.half_done(job)
        assert box.merges.waiting(job.id) is None
        await box.say(name, "done")
        assert (await box.ended(job)).state is JobState.COMPLETED


async def test_the_same_merge_is_one_job_until_it_has_ended(box: Box) -> None:
    first, again, other = await asyncio.gather(box.submit("a"), box.submit("a", priority=3), box.submit("b"))
    assert first.id == again.id != other.id
    await box.half_done(first)
    assert (await box.submit("a")).id == first.id
    await box.say("a", "fail")
    ended = await box.ended(first)
    assert (ended.state, ended.error) == (JobState.FAILED, "a shard is missing")
    with pytest.raises(NotMergeable, match="a shard is missing"):
        merged_path(ended)
    assert (await box.submit("a")).id != first.id
    assert not [path for path in box.left() if path.name.endswith(first.id)]


async def test_cancelling(box: Box) -> None:
    running, waiting = await box.submit("a"), await box.submit("b")
    await box.half_done(running)
    await box.merges.cancel(waiting.id)
    assert (await box.ended(waiting)).state is JobState.CANCELLED
    await box.merges.cancel(running.id)
    ended = await box.ended(running)
    assert (ended.state, await box.events(running)) == (
        JobState.CANCELLED,
        ["submitted", "started", "cancelling", "cancelled"],
    )
    assert box.left() == []
    with pytest.raises(JobAlreadyFinished):
        await box.merges.cancel(running.id)
    last = await box.submit("c")
    await box.half_done(last)


async def test_a_lost_process_is_started_again_and_not_for_ever(box: Box) -> None:
    job = await box.submit("a")
    await box.half_done(job)
    await box.say("a", "crash")
    again = await box.until(job, lambda job: job.attempt == 2 and job.progress and job.progress.done == 1)
    assert again.retries == 1
    await box.say("a", "crash")
    ended = await box.ended(job)
    assert ended.error == "the process that merges ended: killed by SIGSEGV (2 times)"
    assert await box.events(job) == ["submitted", "started", "requeued", "started", "failed"]
    assert box.left() == []


async def test_a_process_that_stops_is_killed_and_the_line_goes_on(box: Box) -> None:
    job, next_one = await box.submit("a"), await box.submit("b")
    await box.half_done(job)
    os.kill(box.child.pid, signal.SIGSTOP)
    await box.until(job, lambda job: job.attempt == 2 and job.progress and job.progress.done == 1)
    for name, ending in (("a", job), ("b", next_one)):
        await box.half_done(ending)
        await box.say(name, "done")
        assert (await box.ended(ending)).state is JobState.COMPLETED
    [lost] = [entry.cause for entry in await box.store.history(job.id) if entry.event == "requeued"]
    assert lost == "the process that merges ended: it did not answer for 10 s (unresponsive_s) and was killed"


async def test_kills_are_not_held_against_a_merge(box: Box) -> None:
    job = await box.submit("a")
    for attempt in (1, 2, 3):
        await box.until(job, lambda job: job.attempt == attempt and job.progress and job.progress.done == 1)  # noqa: B023
        await box.say("a", "die")
    await box.until(job, lambda job: job.attempt == 4 and job.progress and job.progress.done == 1)
    await box.say("a", "done")
    assert (await box.ended(job)).state is JobState.COMPLETED


async def test_a_process_that_cannot_be_started(box: Box) -> None:
    box.refusals = 1
    job = await box.submit("a")
    await box.half_done(job)
    assert box.jobs[job.id].attempt == 2
    await box.say("a", "done")
    assert (await box.ended(job)).state is JobState.COMPLETED
    box.refusals = 2
    assert (await box.ended(await box.submit("b"))).error == "it could not be started: no memory (2 times)"


async def test_what_is_not_merged_is_merged_when_it_is_needed(box: Box) -> None:
    told: list[str] = []
    needed = asyncio.create_task(box.merges.ensure(box.merge("a"), {}, told.append))
    while not told:
        await asyncio.sleep(0)
    await box.half_done(box.jobs[told[0]])
    await box.say("a", "done")
    await needed
    needed = asyncio.create_task(box.merges.ensure(box.merge("b"), {}, told.append))
    while len(told) < 2:
        await asyncio.sleep(0)
    await box.merges.cancel(told[1])
    with pytest.raises(NotMergeable, match=f"the merge, job {told[1]}, was cancelled"):
        await needed


async def test_a_stop_and_the_next_start(box: Box, tmp_path: Path) -> None:
    running, cancelled = await box.submit("a"), await box.submit("b")
    await box.half_done(running)
    waits = asyncio.create_task(box.merges.ended(cancelled.id))
    await asyncio.sleep(0)
    await box.merges.stop()
    with pytest.raises(ShuttingDown):
        await waits
    assert len(box.left()) == 1
    requeued = await box.jobs.requeue(box.jobs[running.id], "the server was stopped")

    after = Box(tmp_path, box.store)
    after.jobs[running.id] = requeued
    await after.merges.recover(requeued)
    await after.until(running, lambda job: job.attempt == 2)
    await after.half_done(running)
    await after.say("a", "done")
    assert (await after.ended(running)).state is JobState.COMPLETED
    await after.close()


async def test_a_merge_that_was_being_cancelled_when_the_server_ended(box: Box) -> None:
    job = await box.submit("a")
    await box.half_done(job)
    await box.merges.stop()
    cancelling = box.jobs[job.id] = await box.jobs.change(box.jobs[job.id], JobEvent.CANCEL)
    await box.merges.recover(cancelling)
    assert (await box.store.get(job.id)).state is JobState.CANCELLED
    assert box.left() == []

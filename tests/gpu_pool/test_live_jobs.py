"""Unfinished jobs: what is shown of them while they run and once they have ended."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gpu_pool.live_jobs import LiveJobs
from gpu_pool.records import Evaluation, Job, JobState, Progress, TaskProgress
from gpu_pool.store import Store
from gpu_pool.transitions import JobEvent


async def test_an_estimate_is_for_running_jobs_only(tmp_path: Path) -> None:
    store = await Store.open(tmp_path / "jobs.sqlite")
    jobs = LiveJobs(store, {})
    evaluation = Evaluation(model="hf", tasks=("t",))
    job = jobs["j"] = Job(id="j", evaluation=evaluation, request={}, created_at=datetime.now(UTC))
    await store.add(job)
    assert jobs.eta_seconds("j") is None
    running = await jobs.start(job)
    for done in (1, 2):
        jobs.progressed("j", Progress(tasks={"t": TaskProgress(done=done, total=4)}))
    assert (jobs.eta_seconds("j") or 0) > 0
    jobs["j"] = msgspec.structs.replace(jobs["j"], state=JobState.COMPLETED)  # durable, not yet let go
    assert jobs.eta_seconds("j") is None
    jobs["j"] = running
    await jobs.settle(running, JobEvent.COMPLETE)
    assert "j" not in jobs
    assert jobs.ended == {JobState.COMPLETED: 1}
    await store.close()

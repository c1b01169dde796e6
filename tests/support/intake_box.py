"""Intake with a real store and runner, on a box that starts no processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from gpu_pool.admission import Admission
from gpu_pool.desk import Desk
from gpu_pool.fleet import Processes
from gpu_pool.gpus import Inventory
from gpu_pool.intake import Intake
from gpu_pool.leases import Leases
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.merges import Merges
from gpu_pool.records import Evaluation, Job, JobState
from gpu_pool.runner import Runner
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store


async def never(*_: object) -> Any:
    raise AssertionError("nothing is to be started")


class IntakeBox(NamedTuple):
    """What takes jobs in, and where they go."""

    store: Store
    jobs: LiveJobs
    runner: Runner
    intake: Intake

    async def add(self, job: Job) -> None:
        """A job that is in the store and is known, as one that was just submitted."""
        self.jobs[job.id] = job
        await self.store.add(job)


def make_evaluation_job(job_id: str, model: Path | str, **fields: Any) -> Job:
    """For the CPU; `fields` are of the job."""
    evaluation = Evaluation(model=str(model), tasks=("t",), device="cpu")
    return Job(id=job_id, work=evaluation, request={}, created_at=datetime.now(UTC), **fields)


@asynccontextmanager
async def intake_box(
    folder: Path, database: Path | str | None = None, admission: Callable[..., Admission] = Admission, **options: Any
) -> AsyncIterator[IntakeBox]:
    """One with its data in `folder`; `options` are settings."""
    settings = PoolSettings(data_dir=folder, cpu_workers=1, evaluators=1, **options)
    store = await Store.open(database or folder / "jobs.sqlite")
    leases = Leases(settings, Inventory(visible_devices=""))
    jobs = LiveJobs(store, dict.fromkeys(JobState, 0))
    processes = Processes(evaluator=never, worker=never, address=str)
    runner = Runner(settings, jobs, leases, processes, lambda job_id: folder / job_id, lambda job, ran_s: None)
    merges = Merges(settings, store, jobs, never, lambda job_id: folder / job_id)
    intake = Intake(
        settings, store, jobs, admission(settings, Desk(never, unresponsive_s=60.0), leases), runner, merges
    )
    try:
        yield IntakeBox(store, jobs, runner, intake)
    finally:
        store.give_up()
        await runner.stop()
        await store.close()

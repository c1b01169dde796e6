"""Whatever is wrong with what a job names, the job ends and does not wait for ever."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpu_pool.admission import Admission
from gpu_pool.desk import Desk
from gpu_pool.fleet import Processes
from gpu_pool.gpus import Inventory
from gpu_pool.intake import Intake
from gpu_pool.leases import Leases
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.merges import Merges
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import Evaluation, Job, JobState, ModelArgs
from gpu_pool.runner import Runner
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store


class Surprised(Admission):
    """Meets a file at the step `fails` that nobody has thought of."""

    fails = "size"

    async def model_args(self, evaluation: Evaluation, path: str | None = None, *, is_merged: bool = True) -> ModelArgs:
        if self.fails == "model":
            raise OverflowError("a number in its configuration")
        return await super().model_args(evaluation, path, is_merged=is_merged)

    async def size(self, *_: object) -> ReplicaSize | None:
        raise OverflowError("a number in its configuration")


@pytest.mark.parametrize("fails", ["model", "size"])
async def test_a_model_that_cannot_be_looked_at_ends_its_job(fails: str, tiny_model: Path, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=1, evaluators=1)
    store = await Store.open(tmp_path / "jobs.sqlite")
    leases = Leases(settings, Inventory(visible_devices=""))
    jobs = LiveJobs(store, {})
    runner = Runner(settings, jobs, leases, nothing, lambda job_id: tmp_path / job_id, lambda job: None)
    admission = Surprised(settings, Desk(never, unresponsive_s=60.0), leases)
    admission.fails = fails
    evaluation = Evaluation(model=str(tiny_model), tasks=("t",), device="cpu")
    job = jobs["j"] = Job(id="j", work=evaluation, request={}, created_at=datetime.now(UTC))
    await store.add(job)
    merges = Merges(store, jobs, never, lambda job_id: tmp_path / job_id, max_attempts=1, unresponsive_s=60.0)
    Intake(settings, store, jobs, admission, runner, merges).take_up(job)
    while (ended := await store.get("j")).state is JobState.QUEUED:
        await asyncio.sleep(0)
    assert ended.state is JobState.FAILED
    assert "a number in its configuration" in (ended.error or "")
    await runner.stop()
    await store.close()


async def never(*_: object) -> None:
    raise AssertionError("nothing is to be started")


nothing = Processes(evaluator=never, worker=never, address=str)

"""Why one job waits: as GET /queue has it, however long the queue is and however many ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from intake_box import IntakeBox, intake_box, make_evaluation_job

from gpu_pool import reasons
from gpu_pool.events import Demand, JobSubmitted
from gpu_pool.merges import Merges
from gpu_pool.reasons import Reasons
from gpu_pool.records import ModelArgs, ModelSpec, Progress
from gpu_pool.views import WaitingView

CPU = ModelSpec(kind="hf", args=ModelArgs(pretrained="m"), fingerprint="f", device="cpu")


async def reasons_of(box: IntakeBox, tmp_path: Path, *given: str) -> Reasons:
    """Of a queue of these jobs, which the scheduler has been given."""
    for order, job_id in enumerate(given):
        await box.add(make_evaluation_job(job_id, "m"))
        demand = Demand(job_id=job_id, spec=CPU, max_replicas=1, order=float(order))
        box.runner.scheduler.step(JobSubmitted(now=0.0, demand=demand))
    merges: Merges = box.intake._merges
    return Reasons(box.runner, box.jobs, merges, box.intake)


async def test_one_job_is_told_what_the_queue_tells(tmp_path: Path) -> None:
    async with intake_box(tmp_path) as box:
        made = await reasons_of(box, tmp_path, "first", "second")
        await box.add(make_evaluation_job("unknown to the scheduler", "m"))
        told = {wait.job_id: wait for wait in made.first(10)}
        assert list(told) == list(box.jobs)
        assert {job_id: made.of(job_id) for job_id in box.jobs} == told
        assert "are being read" in told["unknown to the scheduler"].reason
        assert made.of("nobody's") is None
        running = await box.jobs.start(box.jobs["unknown to the scheduler"])
        assert made.of(running.id) is None
        box.jobs.progressed(running.id, Progress(waits_for="No space left on device: '/out/a'"), 1.0)
        held_up = made.of(running.id)
        assert held_up == WaitingView(
            job_id=running.id, needs="room on a disk", reason="No space left on device: '/out/a'", starts_in=None
        )
        assert made.first(10)[0] == held_up
        assert box.jobs.trouble == f"job {running.id} waits: No space left on device: '/out/a'"
        box.jobs.progressed(running.id, Progress(), 1.0)
        assert (made.of(running.id), box.jobs.trouble) == (None, None)


async def test_who_asks_often_or_stands_far_behind_costs_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasons, "MOST_EXPLAINED", 2)
    monkeypatch.setattr(reasons, "MOST_SHARE", 1e-9)
    async with intake_box(tmp_path) as box:
        made = await reasons_of(box, tmp_path, "first", "second", "third")
        first = made.of("first")
        assert first
        assert made.of("third") == WaitingView(
            job_id="third", needs="its turn", reason="2 jobs are ahead of it.", starts_in=None
        )
        assert made.of("first") is first

"""Jobs: the list, one, its samples and log, and cancelling it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from litestar import delete, get
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter

from gpu_pool.pool import Pool
from server import views
from server.errors import problems
from server.job_files import log_tail, sample_page
from server.responses import JobHistory, JobInfo, JobPage, JobStatus, Message, SamplePage

_MAX_OFFSET = 2**31 - 1


@get("/jobs", tags=["jobs"], responses=problems(400, 422, 503))
async def list_jobs(
    pool: NamedDependency[Pool],
    status: Annotated[JobStatus | None, QueryParameter(description="Only jobs in this state")] = None,
    tag: Annotated[list[str] | None, QueryParameter(description="Only jobs with this tag; several: with all")] = None,
    limit: Annotated[int, QueryParameter(ge=1, le=200, description="Most jobs in the answer")] = 50,
    cursor: Annotated[str | None, QueryParameter(description="The previous page's `next_cursor`")] = None,
) -> JobPage:
    """Jobs, newest first."""
    jobs = await pool.jobs(views.states_of(status) if status else None, limit + 1, cursor, tag or ())
    return views.job_page(jobs, limit, pool)


@get("/jobs/{job_id:str}", tags=["jobs"], responses=problems(400, 404, 503))
async def get_job(job_id: FromPath[str], pool: NamedDependency[Pool]) -> JobInfo:
    """One job with its progress and, as tasks complete, its scores."""
    return views.job_info(await pool.job(job_id), pool)


@delete("/jobs/{job_id:str}", status_code=200, tags=["jobs"], responses=problems(400, 404, 503))
async def cancel_job(job_id: FromPath[str], pool: NamedDependency[Pool]) -> Message:
    """Cancel a queued or running job."""
    await pool.cancel(job_id)
    return Message(message=f"Job {job_id} cancelled")


@get("/jobs/{job_id:str}/events", tags=["jobs"], responses=problems(400, 404, 503))
async def get_events(job_id: FromPath[str], pool: NamedDependency[Pool]) -> JobHistory:
    """What happened to a job so far, with the time, the attempt and the cause: each change of its state, and each
    worker that it lost."""
    return views.job_history(job_id, await pool.history(job_id))


@get("/jobs/{job_id:str}/samples", tags=["jobs"], responses=problems(400, 404, 503))
async def get_samples(
    job_id: FromPath[str],
    pool: NamedDependency[Pool],
    task: Annotated[str | None, QueryParameter(description="May be left out where the job has one task")] = None,
    offset: Annotated[int, QueryParameter(ge=0, le=_MAX_OFFSET, description="Records to skip")] = 0,
    limit: Annotated[int, QueryParameter(ge=1, le=1000, description="Most records in the answer")] = 100,
) -> SamplePage:
    """Per-sample records of a scored task, in lm-eval's format."""
    job = await pool.job(job_id)
    return await asyncio.to_thread(sample_page, job, task, offset, limit)


@get("/jobs/{job_id:str}/log", media_type="text/plain", tags=["jobs"], responses=problems(400, 404, 503))
async def get_log(
    job_id: FromPath[str],
    pool: NamedDependency[Pool],
    tail: Annotated[int, QueryParameter(ge=1, le=100_000, description="Last lines to show")] = 1000,
) -> str:
    """What the job's evaluator wrote."""
    await pool.job(job_id)
    return await asyncio.to_thread(log_tail, pool.job_dir(job_id) / "job.log", tail)

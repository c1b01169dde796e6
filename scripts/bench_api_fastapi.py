"""The application that bench_api.py compares with: evalpool's endpoints in FastAPI and pydantic, from memory.

It answers what a running evalpool answered (a snapshot in JSON, made by bench_api.py), with models of the same fields,
limits and strictness, on uvicorn with the same settings. What it leaves out works in its favour: there is no database,
no file is read, a submission is checked against the names of the snapshot's tasks and kept in a dictionary, and nothing
is evaluated.
"""

from __future__ import annotations

import argparse
import json
import uuid
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)] | None
Status = Literal["queued", "running", "completed", "failed", "cancelled"]
Phase = Literal["preparing", "evaluating", "scoring", "merging"]
Values = dict[str, Any]


class EvaluateRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    model: Name
    tasks: Annotated[list[Name], Field(min_length=1)]
    model_args: Values | None = None
    num_fewshot: Annotated[int, Field(ge=0, le=10_000)] | None = None
    batch_size: (
        Annotated[int, Field(ge=1, le=1_000_000)] | Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,5})$")] | None
    ) = None
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:(0|[1-9][0-9]{0,3}))?)$")] | None = None
    limit: Annotated[int, Field(ge=1, le=2**53)] | Annotated[float, Field(gt=0)] | None = None
    gen_kwargs: str | Values | None = None
    log_samples: bool = True
    predict_only: bool = False
    num_gpus: Annotated[int, Field(ge=0, le=1_000_000)] = 1
    merge: Literal["regular", "ema"] | None = None
    output_dir: Name | None = None
    use_cache: bool = True
    apply_chat_template: bool | Name | None = None
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    random_seed: Seed = 0
    numpy_random_seed: Seed = 1234
    torch_random_seed: Seed = 1234
    fewshot_random_seed: Seed = 1234
    bootstrap_iters: Annotated[int, Field(ge=0, le=10_000_000)] = 100_000


class JobSubmitted(BaseModel):
    job_id: str
    status: Status
    position_in_queue: int
    message: str


class TaskCount(BaseModel):
    done: int
    total: int
    errored: int


class EngineRouteInfo(BaseModel):
    route: str
    reason: str


class ProgressInfo(BaseModel):
    phase: Phase
    done: int
    total: int
    cached: int
    errored: int
    tasks: dict[str, TaskCount]
    workers: dict[str, int]
    routes: list[EngineRouteInfo]
    eta_seconds: float | None


class ModelInfo(BaseModel):
    kind: str
    fingerprint: str
    device: str
    args: Values


class ResultFiles(BaseModel):
    results: str
    samples: list[str]


class JobInfo(BaseModel):
    job_id: str
    status: Status
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    request: Values
    result: dict[str, ResultFiles] | None
    error: str | None
    position_in_queue: int | None
    phase: Phase | None
    progress: ProgressInfo | None
    metrics: dict[str, Values]
    attempt: int
    model: ModelInfo | None
    retries: int
    tags: list[str]
    kind: Literal["evaluation", "merge"]
    merged_path: str | None
    waits_for: str | None
    expected_start: datetime | None


class JobPage(BaseModel):
    jobs: list[JobInfo]
    next_cursor: str | None


class SamplePage(BaseModel):
    task: str
    offset: int
    limit: int
    total: int
    samples: list[Values]


class WaitingInfo(BaseModel):
    job_id: str
    needs: str
    reason: str
    expected_start: datetime | None


class QueueInfo(BaseModel):
    queue_size: int
    running_job: str | None
    queued_jobs: list[str]
    completed_jobs: int
    failed_jobs: int
    running_jobs: list[str]
    cancelled_jobs: int
    waiting: list[WaitingInfo]


class Health(BaseModel):
    status: str
    timestamp: datetime
    queue_size: int
    trouble: str | None


class TaskList(BaseModel):
    tasks: list[str]


class ModelList(BaseModel):
    models: list[str]


class FieldProblem(BaseModel):
    field: str
    problem: str
    choices: list[str]


class Problem(BaseModel):
    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]


class Snapshot(BaseModel):
    """What evalpool answered."""

    queue: QueueInfo
    jobs: list[JobInfo]
    """Newest first."""
    tasks: list[str]
    models: list[str]
    samples: dict[str, dict[str, list[Values]]]
    """Job -> task -> its records."""


def create_app(snapshot: Snapshot) -> FastAPI:
    """The application over `snapshot`; only submissions change what it holds."""
    app = FastAPI(exception_handlers={RequestValidationError: _invalid, HTTPException: _refused})
    jobs = {job.job_id: job for job in snapshot.jobs}
    newest_first = snapshot.jobs
    task_names = set(snapshot.tasks)
    submitted: dict[str, EvaluateRequest] = {}

    @app.get("/health")
    async def health() -> Health:
        return Health(status="healthy", timestamp=datetime.now(UTC), queue_size=snapshot.queue.queue_size, trouble=None)

    @app.get("/queue")
    async def queue() -> QueueInfo:
        return snapshot.queue

    @app.get("/jobs")
    async def list_jobs(
        status: Status | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        cursor: str | None = None,
    ) -> JobPage:
        found = [job for job in newest_first if status in (None, job.status)]
        start = next((i + 1 for i, job in enumerate(found) if job.job_id == cursor), 0) if cursor else 0
        page = found[start : start + limit]
        return JobPage(jobs=page, next_cursor=page[-1].job_id if len(found) > start + limit else None)

    @app.get("/jobs/{job_id}")
    async def get_job(job_id: str) -> JobInfo:
        if job_id not in jobs:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"There is no job {job_id}")
        return jobs[job_id]

    @app.get("/jobs/{job_id}/samples")
    async def get_samples(
        job_id: str,
        task: str | None = None,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> SamplePage:
        of_job = snapshot.samples.get(job_id, {})
        name = task or next(iter(of_job), "")
        if name not in of_job:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There are no such samples")
        records = of_job[name]
        return SamplePage(
            task=name, offset=offset, limit=limit, total=len(records), samples=records[offset : offset + limit]
        )

    @app.get("/tasks")
    async def list_tasks() -> TaskList:
        return TaskList(tasks=snapshot.tasks)

    @app.get("/models")
    async def list_models() -> ModelList:
        return ModelList(models=snapshot.models)

    @app.post("/evaluate")
    async def evaluate(data: EvaluateRequest) -> JobSubmitted:
        if unknown := [task for task in data.tasks if task not in task_names]:
            raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, f"There is no task {unknown[0]}")
        job_id = str(uuid.uuid4())
        submitted[job_id] = data
        return JobSubmitted(
            job_id=job_id,
            status="queued",
            position_in_queue=0,
            message="Job queued successfully. Position in queue: 0",
        )

    return app


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = [
        FieldProblem(field=".".join(str(part) for part in one["loc"][1:]), problem=one["msg"], choices=[])
        for one in error.errors()
    ]
    detail = "; ".join(f"{problem.field}: {problem.problem}" for problem in problems)
    return _problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, problems)


async def _refused(request: Request, error: HTTPException) -> JSONResponse:
    return _problem(HTTPStatus(error.status_code), str(error.detail), [])


def _problem(status: HTTPStatus, detail: str, errors: list[FieldProblem]) -> JSONResponse:
    problem = Problem(type="about:blank", title=status.phrase, status=int(status), detail=detail, errors=errors)
    return JSONResponse(problem.model_dump(mode="json"), status, media_type="application/problem+json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True, help="JSON that bench_api.py wrote")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    snapshot = Snapshot.model_validate(json.loads(arguments.snapshot.read_text()))
    # as server/serve.py has it
    uvicorn.run(
        create_app(snapshot),
        host="127.0.0.1",
        port=arguments.port,
        lifespan="off",
        access_log=False,
        log_level="warning",
        log_config=None,
    )


if __name__ == "__main__":
    main()

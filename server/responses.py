"""Bodies of responses of the REST face, as OpenAPI shows them."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct


class JobStatus(enum.StrEnum):
    """A job's state as it is shown outside."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Response(Struct, frozen=True, kw_only=True):
    """Base of response bodies."""


class JobSubmitted(Response, frozen=True, kw_only=True):
    """The job is durable; poll GET /jobs/{job_id}."""

    job_id: str
    status: JobStatus
    position_in_queue: int
    message: str


class TaskCount(Response, frozen=True, kw_only=True):
    """Requests of one task: done so far, and in all; those that ended in an error are done, too."""

    done: int
    total: int
    errored: int


class EngineRouteInfo(Response, frozen=True, kw_only=True):
    """How workers compute the model: "tree", each shared beginning once, "plain", or "api"; and why."""

    route: str
    reason: str


class ProgressInfo(Response, frozen=True, kw_only=True):
    """How far a job is: an evaluation in model requests, a merge in bytes of weights."""

    phase: Literal["preparing", "evaluating", "scoring", "merging"]
    done: int
    total: int
    cached: int
    errored: int
    tasks: dict[str, TaskCount]
    workers: dict[str, int]
    routes: list[EngineRouteInfo]
    eta_seconds: float | None


class ModelInfo(Response, frozen=True, kw_only=True):
    """The model that a job evaluates, by its content."""

    kind: str
    fingerprint: str
    device: str
    args: dict[str, Any]


class ResultFiles(Response, frozen=True, kw_only=True):
    """Paths on the server, as the reference gives them."""

    results: str
    samples: list[str]


class JobInfo(Response, frozen=True, kw_only=True):
    """One job: the reference's nine keys first.

    `metrics` has lm-eval's keys for each task and group and, where requests ended in an error, how many did
    (`evalpool_errored`) and which metrics have no score without them, and why (`evalpool_missing`).
    """

    job_id: str
    status: JobStatus
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    request: dict[str, Any]
    result: dict[str, ResultFiles] | None
    error: str | None
    position_in_queue: int | None
    phase: Literal["preparing", "evaluating", "scoring", "merging"] | None
    progress: ProgressInfo | None
    metrics: dict[str, dict[str, Any]]
    attempt: int
    model: ModelInfo | None
    retries: int
    tags: list[str]
    kind: Literal["evaluation", "merge"]
    """Whose fields `request` has: those of POST /evaluate or of POST /merge."""
    merged_path: str | None
    """Of a merge that is completed: the folder that can be evaluated."""
    waits_for: str | None
    """Why the job does not run, or not on, as GET /queue says it; null when it does not wait."""
    expected_start: datetime | None
    """When it is expected to, where something is known to tell from."""


class JobEventInfo(Response, frozen=True, kw_only=True):
    """One thing that happened to a job, and the state that followed.

    `worker_lost`: a worker of the job ended, could not load its model, or was on a GPU that is lost. Others compute
    what it had; what comes of it otherwise is an event of its own. `model_changed`: the files of its model are others
    than in the last attempt, so that the next one evaluates another model; the cause has the fingerprints of both.
    """

    at: datetime
    event: Literal[
        "submitted",
        "started",
        "worker_lost",
        "model_changed",
        "requeued",
        "cancelling",
        "completed",
        "failed",
        "cancelled",
    ]
    status: JobStatus
    attempt: int
    cause: str | None


class JobHistory(Response, frozen=True, kw_only=True):
    """What happened to a job, in order."""

    job_id: str
    events: list[JobEventInfo]


class JobPage(Response, frozen=True, kw_only=True):
    """Jobs, newest first; `next_cursor` asks for the page after this one."""

    jobs: list[JobInfo]
    next_cursor: str | None


class Message(Response, frozen=True, kw_only=True):
    """What was done."""

    message: str


Sample = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
"""A record as it was written: what lies in a file as JSON need not be built and written anew."""


class SamplePage(Response, frozen=True, kw_only=True):
    """Records of one task in file order, as lm-eval writes them; `total` counts all."""

    task: str
    offset: int
    limit: int
    total: int
    samples: list[Sample]


class WaitingInfo(Response, frozen=True, kw_only=True):
    """Why a job waits."""

    job_id: str
    needs: str
    """What it must get before it can start."""
    reason: str
    """What there is of that, who holds the rest, what cannot be used and why."""
    expected_start: datetime | None
    """An estimate from what the running jobs still need; null where nothing is known to make one from."""


class QueueInfo(Response, frozen=True, kw_only=True):
    """What waits, runs and is done."""

    queue_size: int
    running_job: str | None
    queued_jobs: list[str]
    completed_jobs: int
    failed_jobs: int
    running_jobs: list[str]
    cancelled_jobs: int
    waiting: list[WaitingInfo]
    """Running jobs that cannot go on or have lost their workers, and the first of `queued_jobs`, in their order."""


class Health(Response, frozen=True, kw_only=True):
    """The server answers; `trouble` says what keeps it from its work, and then it is degraded."""

    status: Literal["healthy", "degraded"]
    timestamp: datetime
    queue_size: int
    trouble: str | None


class TaskInfo(Response, frozen=True, kw_only=True):
    """One name that `tasks` may contain."""

    name: str
    kind: Literal["task", "group", "tag"]
    library: Literal["lm-eval", "lmms-eval"]
    """Whose it is; the operator's own tasks are lm-eval's."""
    output_type: str | None
    modality: Literal["text", "image", "audio", "video"] | None
    """What its documents show beside text, where that is known."""
    documents: int | None
    """How many it has, where that is known without reading them."""
    note: str | None
    """Which library the name means, where both have it."""


class TaskList(Response, frozen=True, kw_only=True, omit_defaults=True):
    """Names for `tasks`; `entries` only with ?details=true."""

    tasks: list[str]
    entries: list[TaskInfo] | None = None


class ModelNameInfo(Response, frozen=True, kw_only=True):
    """One name that `model` may be."""

    name: str
    runs_on: Literal["engine", "api"] | None
    """evalpool's own engine, an endpoint that the operator lists, or nothing here."""
    pretrained: str | None
    """The checkpoint that is evaluated where `model_args` names none."""
    reason: str | None
    """Why it cannot run here."""
    nearest: list[str]
    """Of one that cannot, names that can and come closest."""
    note: str | None
    defaults: dict[str, int]
    """Arguments that are these where `model_args` does not give them: those of the reference's class of that name."""


class ModelArgumentInfo(Response, frozen=True, kw_only=True):
    """One name in `model_args` of models on the engine."""

    name: str
    meaning: str | None
    """The name of the argument that it is here; None: it is accepted, and means nothing."""
    note: str | None


class EndpointInfo(Response, frozen=True, kw_only=True):
    """An endpoint that `model_args.endpoint` may name."""

    name: str
    kind: Literal["chat", "completions"]
    base_url: str
    model: str | None
    """Where a request names none."""


class ModelList(Response, frozen=True, kw_only=True, omit_defaults=True):
    """Kinds for `model`, aliases included; the rest only with ?details=true."""

    models: list[str]
    entries: list[ModelNameInfo] | None = None
    arguments: list[ModelArgumentInfo] | None = None
    endpoints: list[EndpointInfo] | None = None


class MergeResult(Response, frozen=True, kw_only=True):
    """The merged checkpoint."""

    success: bool
    message: str
    merged_path: str | None


class FieldProblem(Response, frozen=True, kw_only=True):
    """What is wrong with one field, and what would be right."""

    field: str
    problem: str
    choices: list[str]


class Problem(Response, frozen=True, kw_only=True):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem]

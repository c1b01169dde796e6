"""Requests and responses of the REST face. Field descriptions are what OpenAPI shows and what errors quote."""

from __future__ import annotations

import enum
from datetime import date, datetime
from typing import Annotated, Any, Literal

from msgspec import Meta, Raw, Struct

MOST_DOCUMENTS = 2**53
"""The highest `limit`: beyond it floats are no exact numbers, and messages cannot hold them all."""

_SEED_MAX = 2**32 - 1
_BATCH_SIZE = r"^(auto|[1-9][0-9]{0,5})(?!\n)$"  # `$` alone lets a final newline through
_DEVICE = r"^(cpu|cuda(:(0|[1-9][0-9]{0,3}))?|(GPU|MIG)-[0-9A-Za-z/-]{1,80})(?!\n)$"
_TAG = r"^[A-Za-z0-9][A-Za-z0-9._:/=+-]{0,63}(?!\n)$"

Name = Annotated[str, Meta(min_length=1)]
Seed = Annotated[int, Meta(ge=0, le=_SEED_MAX)] | None


class Request(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: unknown fields are refused."""


class EvaluateRequest(Request, frozen=True, kw_only=True):
    """What to evaluate and how. Everything but `model` and `tasks` has a default."""

    model: Annotated[
        Name, Meta(description='A model kind such as "hf" (with `pretrained` in `model_args`), a path or a hub id')
    ]
    tasks: Annotated[
        list[Name],
        Meta(
            min_length=1,
            description="A non-empty list of task, group or tag names without repetition; GET /tasks lists them",
            extra_json_schema={"uniqueItems": True},
        ),
    ]
    model_args: Annotated[
        dict[str, Any] | None,
        Meta(description="An object of model arguments: pretrained, dtype, revision, attn_implementation, peft…"),
    ] = None
    num_fewshot: Annotated[
        Annotated[int, Meta(ge=0, le=10_000)] | None,
        Meta(description="A number of few-shot examples, 0 or more; null: what the task says"),
    ] = None
    batch_size: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | Annotated[str, Meta(pattern=_BATCH_SIZE)] | None,
        Meta(description='Most sequences in one forward pass: a positive integer or "auto"; null: "auto"'),
    ] = None
    device: Annotated[
        Annotated[str, Meta(pattern=_DEVICE)] | None,
        Meta(
            description='"cpu", "cuda" (any GPU), "cuda:N" (GPU N in PCI order) or the UUID of a GPU or MIG instance '
            '("GPU-…", "MIG-…"); null: GPUs where there are any'
        ),
    ] = None
    limit: Annotated[
        Annotated[int, Meta(ge=1, le=MOST_DOCUMENTS)]
        | Annotated[float, Meta(gt=0, extra_json_schema={"exclusiveMaximum": 1})]
        | None,
        Meta(description="A number of documents of each task (1 or more) or a fraction of them (between 0 and 1)"),
    ] = None
    gen_kwargs: Annotated[
        str | dict[str, Any] | None,
        Meta(description='Generation options: "temperature=0,max_gen_toks=64" or an object'),
    ] = None
    log_samples: Annotated[bool, Meta(description="true or false: keep a record of every sample")] = True
    predict_only: Annotated[bool, Meta(description="true or false: predictions without metrics")] = False
    num_gpus: Annotated[
        int,
        Meta(ge=0, le=1_000_000, description="Most GPUs to use, 0 or more; 0: CPU. Without GPUs it counts CPU workers"),
    ] = 1
    output_dir: Annotated[
        Name | None, Meta(description="A folder for result files, under a root that the operator allows")
    ] = None
    use_cache: Annotated[
        bool, Meta(description="true or false: answer requests that this model has answered before from the cache")
    ] = True
    deterministic: Annotated[
        bool, Meta(description="true or false: bits of answers that do not depend on batches, workers or cache; slower")
    ] = False
    apply_chat_template: Annotated[
        bool | Name, Meta(description="true, false, or the name of one of the tokenizer's chat templates")
    ] = False
    system_instruction: Annotated[str | None, Meta(description="A text put before every prompt")] = None
    fewshot_as_multiturn: Annotated[
        bool, Meta(description="true or false: few-shot examples as turns of a conversation (with a chat template)")
    ] = True
    random_seed: Annotated[Seed, Meta(description="Seed of Python's random; null: not seeded")] = 0
    numpy_random_seed: Annotated[Seed, Meta(description="Seed of numpy; null: not seeded")] = 1234
    torch_random_seed: Annotated[Seed, Meta(description="Seed of torch; null: not seeded")] = 1234
    fewshot_random_seed: Annotated[Seed, Meta(description="Seed of the few-shot sampler; null: not seeded")] = 1234
    bootstrap_iters: Annotated[
        int, Meta(ge=0, le=10_000_000, description="Bootstrap rounds behind standard errors; 0: no standard errors")
    ] = 100_000
    priority: Annotated[
        int, Meta(ge=-1000, le=1000, description="An integer from -1000 to 1000; larger goes first")
    ] = 0
    timeout_s: Annotated[
        Annotated[float, Meta(gt=0, le=31_536_000)] | None,
        Meta(description="Seconds that the job may run, waiting not counted, before it fails; null: no limit"),
    ] = None
    max_retries: Annotated[
        Annotated[int, Meta(ge=0, le=100)] | None,
        Meta(
            description="Further attempts after its processes were lost, 0 or more (a restart of the server uses none "
            "up); null: as many as the operator allows"
        ),
    ] = None
    max_error_share: Annotated[
        float,
        Meta(ge=0, le=1, description="Share of its requests, from 0 to 1, that may end in an error before it fails"),
    ] = 0.0
    tags: Annotated[
        Annotated[list[Annotated[str, Meta(pattern=_TAG)]], Meta(max_length=32)] | None,
        Meta(
            description="At most 32 words to find the job by, of letters, digits and . _ : / = + -, without repetition",
            extra_json_schema={"uniqueItems": True},
        ),
    ] = None
    idempotency_key: Annotated[
        Annotated[str, Meta(min_length=1, max_length=255)] | None,
        Meta(description="A text of your choice: sent again with the same request it means the same job, not another"),
    ] = None


class PruneRequest(Request, frozen=True, kw_only=True):
    """Which cached answers to delete; with neither field only what is above the size limit."""

    older_than_days: Annotated[
        Annotated[int, Meta(ge=0, le=100_000)] | None,
        Meta(description="Only answers not used for so many days; 0: all"),
    ] = None
    model: Annotated[Name | None, Meta(description="Only this model's answers: its path or id, or fingerprint")] = None


class MergeRequest(Request, frozen=True, kw_only=True):
    """A sharded training checkpoint to turn into one that can be evaluated."""

    checkpoint_path: Annotated[
        Name, Meta(description="Folder of the sharded checkpoint, or one above several `checkpoint-N`: the latest")
    ]
    output_path: Annotated[
        Name | None, Meta(description="Folder to write to, under an allowed root; null: the checkpoint's own")
    ] = None
    checkpoint_type: Annotated[
        Literal["regular", "ema"],
        Meta(description='"regular" for the model\'s weights, "ema" for their average'),
    ] = "regular"


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


class ProgressInfo(Response, frozen=True, kw_only=True):
    """How far a job is, in model requests."""

    phase: Literal["preparing", "evaluating", "scoring"]
    done: int
    total: int
    cached: int
    errored: int
    tasks: dict[str, TaskCount]
    workers: dict[str, int]
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
    (`evalpool_errored`).
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
    phase: Literal["preparing", "evaluating", "scoring"] | None
    progress: ProgressInfo | None
    metrics: dict[str, dict[str, Any]]
    attempt: int
    model: ModelInfo | None
    retries: int
    tags: list[str]


class JobEventInfo(Response, frozen=True, kw_only=True):
    """One thing that happened to a job, and the state that followed."""

    at: datetime
    event: Literal["submitted", "started", "requeued", "cancelling", "completed", "failed", "cancelled"]
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
    """Running jobs that have lost their workers, and the first of `queued_jobs`, in their order."""


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
    output_type: str | None


class TaskList(Response, frozen=True, kw_only=True, omit_defaults=True):
    """Names for `tasks`; `entries` only with ?details=true."""

    tasks: list[str]
    entries: list[TaskInfo] | None = None


class ModelList(Response, frozen=True, kw_only=True):
    """Kinds for `model`, aliases included."""

    models: list[str]


class GpuProcess(Response, frozen=True, kw_only=True):
    """A process on a GPU."""

    pid: int
    """0: processes that NVML does not list, told by the memory that grows beside workers without jobs."""
    used_bytes: int
    """0 where the driver does not tell."""


class GpuInfo(Response, frozen=True, kw_only=True):
    """One GPU or MIG instance, whether a worker could start on it now, and who is on it."""

    uuid: str
    index: str
    name: str
    total_bytes: int
    free_bytes: int
    utilization_percent: int | None
    temperature_celsius: int | None
    worker_id: str | None
    """The first of `worker_ids`."""
    free: bool
    reason: str | None
    """Why no worker can start on it, or what is wrong although one is on it."""
    worker_ids: list[str]
    """Workers on it, those among them that have ended but whose memory is not back yet."""
    foreign_processes: list[GpuProcess]
    """Processes on it that are not the server's."""
    quarantined: bool
    """Not used until `POST /gpus/{uuid}/release`."""
    lost: bool
    """It cannot compute any more."""


class GpuList(Response, frozen=True, kw_only=True):
    """All GPUs that the server may use."""

    gpus: list[GpuInfo]
    held: int
    """GPUs with workers on them."""
    max_gpus: int | None
    """Most GPUs that the operator lets the server hold; null: no limit."""
    problem: str | None
    """Why there is no GPU to use, or entries of allow_gpus and deny_gpus that name none; null: nothing is wrong."""


class WorkerInfo(Response, frozen=True, kw_only=True):
    """One worker process and the model it holds."""

    worker_id: str
    state: Literal["starting", "idle", "busy", "stopping", "dead"]
    pid: int | None
    slots: list[str]
    jobs: list[str]
    description: str | None
    memory_bytes: int | None
    model: ModelInfo


class WorkerList(Response, frozen=True, kw_only=True):
    """All worker processes."""

    workers: list[WorkerInfo]


class MergeResult(Response, frozen=True, kw_only=True):
    """The merged checkpoint."""

    success: bool
    message: str
    merged_path: str | None


class CachedModelInfo(Response, frozen=True, kw_only=True):
    """The answers of one model in the response cache."""

    fingerprint: str
    """Empty: of answers from before models were noted."""
    name: str
    entries: int
    bytes: int
    hits: int
    last_used: date | None


class CacheInfo(Response, frozen=True, kw_only=True):
    """The response cache. `hits`: requests that jobs have been spared since the cache was made."""

    entries: int
    bytes: int
    max_bytes: int
    hits: int
    models: list[CachedModelInfo]


class CachePruned(Response, frozen=True, kw_only=True):
    """What was deleted, and by how much the file is smaller."""

    deleted_entries: int
    freed_bytes: int


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

"""What the server and its processes say to each other: one frozen Struct a message, one tagged union a direction.

Control pipes (server <-> evaluator, server <-> worker) and data channels (`chunk_messages`) carry the same framing: a
4-byte big-endian signed length, then one msgpack message (`multiprocessing.Connection`'s format).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from gpu_pool.endpoints import Endpoint
from gpu_pool.records import (
    DEFAULT_CACHE_MAX_BYTES,
    Evaluation,
    JobResult,
    Merge,
    Modality,
    ModelSpec,
    Progress,
    Record,
)

MAX_MESSAGE_BYTES = 256 * 1024 * 1024


class Message(Record, frozen=True, kw_only=True, tag=True):
    """Base of all messages."""


# ---------------------------------------------------------------- how children start (pickled by spawn, not framed)


class EvaluatorStart(Record, frozen=True, kw_only=True):
    """What an evaluator process is told when it is spawned."""

    evaluator_id: str
    data_dir: str
    """The server's data folder: the response cache and the task catalogue live under it."""
    log_path: str
    include_paths: tuple[str, ...] = ()
    dataset_roots: dict[str, str] = {}
    """Hub data set -> local files; the syntax is in `gpu_pool.evaluator.dataset_roots`."""
    allow_code_execution: bool = False
    allow_judges: bool = False
    allow_remote_code: bool = False
    cache_max_bytes: int = DEFAULT_CACHE_MAX_BYTES
    """Of the response cache's file."""
    runs_jobs: bool = True
    """False: it only answers questions about tasks, and is ready sooner and smaller without what jobs need."""


class WorkerStart(Record, frozen=True, kw_only=True):
    """What a worker process is told when it is spawned."""

    worker_id: str
    spec: ModelSpec
    socket_path: str
    """Where it listens for evaluators once its model is loaded."""
    log_path: str
    data_dir: str
    visible_devices: str = ""
    """CUDA_VISIBLE_DEVICES, set before torch is imported; empty for a CPU worker."""
    tensor_parallel: int = 1
    """Processes (ranks) that the model is to be sharded over: on GPUs one for each visible device. Where the model
    cannot be sharded, one process spreads its layers over the devices."""
    memory_bytes: int = 0
    """Most memory that it may take of each of its GPUs, beside other workers of ours; 0: all that is free."""
    threads: int = 1
    """Intra-op threads of a CPU worker, all its ranks together."""
    allow_remote_code: bool = False

    @property
    def threads_of_a_rank(self) -> int:
        return max(1, self.threads // self.tensor_parallel)


class ApiWorkerStart(Record, frozen=True, kw_only=True):
    """What a process that asks an endpoint is told when it is spawned. Where the key is, not what it is."""

    worker_id: str
    name: str
    """The operator's, of the endpoint."""
    endpoint: Endpoint
    socket_path: str
    log_path: str


class MergeStart(Record, frozen=True, kw_only=True):
    """What a process that merges a checkpoint is told when it is spawned."""

    job_id: str
    merge: Merge
    staging_path: str
    """Where it writes until all is there; the server removes what is left of it."""
    log_path: str


# ---------------------------------------------------------------- server -> evaluator


class RunJob(Message, frozen=True, kw_only=True):
    """Evaluate this. Workers follow by AttachWorker, maybe later: prepare meanwhile."""

    job_id: str
    evaluation: Evaluation
    model: ModelSpec
    output_dir: str
    """Folder of this job's result files; exists, absolute."""
    log_path: str
    submitted_at: datetime | None = None
    """The date in the names of its result files, of every attempt; None: now."""


class AttachWorker(Message, frozen=True, kw_only=True):
    """This worker serves the job from now on: connect to it."""

    job_id: str
    worker_id: str
    address: str


class DetachWorker(Message, frozen=True, kw_only=True):
    """Stop using this worker for the job; re-send what it had elsewhere."""

    job_id: str
    worker_id: str
    at_once: bool = True
    """False: wait for what is in flight there, ask nothing more, then say WorkerDetached."""
    cause: str | None = None
    """How its process ended; None when it lives and is wanted elsewhere."""
    from_outside: bool = False
    """Whether somebody killed it, which says nothing of what it computed."""


class CheckTasks(Message, frozen=True, kw_only=True):
    """Can these tasks be run here? Answered by TasksChecked; asked of an evaluator that runs no job."""

    check_id: int
    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    """The request's: few-shot examples need a split of their own."""
    modalities: tuple[Modality, ...] = ("text",)
    """What the model takes."""
    no_scores: str | None = None
    """Why the model gives no log-likelihoods; None: it does."""


class BuildCatalogue(Message, frozen=True, kw_only=True):
    """Index all tasks (or read the index kept on disk); answered by Catalogue."""


class Shutdown(Message, frozen=True, kw_only=True):
    """End now, politely (to evaluators and workers)."""


class Ping(Message, frozen=True, kw_only=True):
    """Answered by Alive, at any time, by the thread that takes messages (by all children)."""


ToEvaluator = RunJob | AttachWorker | DetachWorker | CheckTasks | BuildCatalogue | Ping | Shutdown


# ---------------------------------------------------------------- evaluator -> server


class EvaluatorReady(Message, frozen=True, kw_only=True):
    """Imports are done, the task index is loaded, no job runs: send one. Repeated after each job."""

    rss_bytes: int


class TaskEntry(Record, frozen=True, kw_only=True):
    """One name that `tasks` may contain."""

    name: str
    kind: Literal["task", "group", "tag"]
    library: Literal["lm-eval", "lmms-eval"] = "lm-eval"
    """Whose task it is; the operator's own are lm-eval's."""
    output_type: str | None = None
    """The library's output type of a task, where its YAML says it."""
    modality: Modality | None = None
    """What its documents show beside text, where that is known."""
    documents: int | None = None
    """How many it has, where local files tell without being read."""
    note: str | None = None
    """Set where both libraries have a task of this name."""


class Catalogue(Message, frozen=True, kw_only=True):
    """Every task, group and tag known here, sorted by name."""

    entries: tuple[TaskEntry, ...]


class TaskProblem(Record, frozen=True, kw_only=True):
    """Why one requested task is refused."""

    task: str
    reason: str
    """A sentence for the user, saying what would be right."""
    suggestions: tuple[str, ...] = ()


class TasksChecked(Message, frozen=True, kw_only=True):
    """The answer to CheckTasks: empty problems means that all can run."""

    check_id: int
    problems: tuple[TaskProblem, ...]


class JobProgress(Message, frozen=True, kw_only=True):
    """At most a few a second."""

    job_id: str
    progress: Progress


class WorkerDetached(Message, frozen=True, kw_only=True):
    """This worker has nothing of the job any more, as a DetachWorker asked that was not `at_once`."""

    job_id: str
    worker_id: str


class TaskDone(Message, frozen=True, kw_only=True):
    """One task (or group) is scored and its files are written, while others may still run."""

    job_id: str
    task: str
    metrics: dict[str, Any]
    samples_path: str | None = None


class JobDone(Message, frozen=True, kw_only=True):
    """The job's results are on disk. EvaluatorReady follows."""

    job_id: str
    result: JobResult
    progress: Progress


class JobFailed(Message, frozen=True, kw_only=True):
    """The job cannot be completed; `error` is for the user. EvaluatorReady follows."""

    job_id: str
    error: str
    content_changed: bool = False
    """True when the model's files are no longer those that were submitted: the job deserves another look at them."""


class AwaitingWorker(Message, frozen=True, kw_only=True):
    """This worker owes the job answers, and nothing has come from it for a while. Repeated until something comes."""

    job_id: str
    worker_id: str


class WorkerUnreachable(Message, frozen=True, kw_only=True):
    """The job's connection to this worker failed, and nobody has said that the worker's process ended."""

    job_id: str
    worker_id: str
    error: str
    """What happened to the connection."""


class Alive(Message, frozen=True, kw_only=True):
    """The answer to Ping."""


class EvaluatorFailed(Message, frozen=True, kw_only=True):
    """The evaluator cannot go on, and why; it exits after this."""

    error: str


FromEvaluator = (
    EvaluatorReady
    | Catalogue
    | TasksChecked
    | JobProgress
    | WorkerDetached
    | AwaitingWorker
    | WorkerUnreachable
    | TaskDone
    | JobDone
    | JobFailed
    | Alive
    | EvaluatorFailed
)


# ---------------------------------------------------------------- server <-> merger


ToMerger = Ping | Shutdown


class MergeDone(Message, frozen=True, kw_only=True):
    """The merged checkpoint is in its place."""

    job_id: str
    progress: Progress


FromMerger = JobProgress | MergeDone | JobFailed | Alive


# ---------------------------------------------------------------- server -> worker


class DropJob(Message, frozen=True, kw_only=True):
    """Forget every request of this job at the next step; answered by Dropped."""

    job_id: str


ToWorker = DropJob | Ping | Shutdown


# ---------------------------------------------------------------- worker -> server


class WorkerReady(Message, frozen=True, kw_only=True):
    """The model is loaded, its content is the fingerprint asked for, and the data socket listens."""

    memory_bytes: int
    description: str
    """One line for people: class, parameters, dtype, attention implementation; how it is computed, and why so."""


class LoadFailed(Message, frozen=True, kw_only=True):
    """The model cannot be served; the worker exits after this."""

    error: str
    content_changed: bool = False
    """True when the files on disk are no longer the fingerprint that was asked for."""
    out_of_memory: bool = False
    """True when there was less memory on its GPUs than it takes; others may have taken some since it was started."""


class Dropped(Message, frozen=True, kw_only=True):
    """No request of the job is computed or queued any more."""

    job_id: str


class BatchProgress(Message, frozen=True, kw_only=True):
    """The computing thread has begun another batch or step. At most one a second, and none while there is no work."""


class WorkerFailed(Message, frozen=True, kw_only=True):
    """The worker cannot go on, and why; it exits after this."""

    error: str


FromWorker = WorkerReady | LoadFailed | Dropped | BatchProgress | Alive | WorkerFailed


_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One message as msgpack, without the frame's length."""
    return _encoder.encode(message)


decode_to_evaluator = msgspec.msgpack.Decoder(ToEvaluator).decode
decode_from_evaluator = msgspec.msgpack.Decoder(FromEvaluator).decode
decode_to_merger = msgspec.msgpack.Decoder(ToMerger).decode
decode_from_merger = msgspec.msgpack.Decoder(FromMerger).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode

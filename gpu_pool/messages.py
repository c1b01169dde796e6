"""Everything that crosses a process boundary: one frozen Struct a message, one tagged union a direction.

Control pipes (server <-> evaluator, server <-> worker) and data channels (evaluator <-> worker, a unix socket) carry
the same framing: a 4-byte big-endian signed length, then one msgpack message (`multiprocessing.Connection`'s format).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gpu_pool.records import Evaluation, JobResult, ModelSpec, Progress, Record

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
    allow_remote_code: bool = False
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
    threads: int = 1
    """Intra-op threads of a CPU worker."""
    allow_remote_code: bool = False


# ---------------------------------------------------------------- server -> evaluator


class RunJob(Message, frozen=True, kw_only=True):
    """Evaluate this. Workers follow by AttachWorker, maybe later: prepare meanwhile."""

    job_id: str
    evaluation: Evaluation
    model: ModelSpec
    output_dir: str
    """Folder of this job's result files; exists, absolute."""
    log_path: str


class AttachWorker(Message, frozen=True, kw_only=True):
    """This worker serves the job from now on: connect to it."""

    job_id: str
    worker_id: str
    address: str


class DetachWorker(Message, frozen=True, kw_only=True):
    """Stop using this worker for the job (it died, or is wanted elsewhere); re-send what it had elsewhere."""

    job_id: str
    worker_id: str


class CheckTasks(Message, frozen=True, kw_only=True):
    """Can these tasks be run here? Answered by TasksChecked; asked of an evaluator that runs no job."""

    check_id: int
    tasks: tuple[str, ...]
    num_fewshot: int | None = None
    """The request's: few-shot examples need a split of their own."""


class BuildCatalogue(Message, frozen=True, kw_only=True):
    """Index all tasks (or read the index kept on disk); answered by Catalogue."""


class Shutdown(Message, frozen=True, kw_only=True):
    """End now, politely (to evaluators and workers)."""


ToEvaluator = RunJob | AttachWorker | DetachWorker | CheckTasks | BuildCatalogue | Shutdown


# ---------------------------------------------------------------- evaluator -> server


class EvaluatorReady(Message, frozen=True, kw_only=True):
    """Imports are done, the task index is loaded, no job runs: send one. Repeated after each job."""

    rss_bytes: int


class TaskEntry(Record, frozen=True, kw_only=True):
    """One name that `tasks` may contain."""

    name: str
    kind: Literal["task", "group", "tag"]
    output_type: str | None = None
    """lm-eval's output type of a task, where its YAML says it."""


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


FromEvaluator = EvaluatorReady | Catalogue | TasksChecked | JobProgress | TaskDone | JobDone | JobFailed


# ---------------------------------------------------------------- server -> worker


class DropJob(Message, frozen=True, kw_only=True):
    """Forget every request of this job at the next step; answered by Dropped."""

    job_id: str


ToWorker = DropJob | Shutdown


# ---------------------------------------------------------------- worker -> server


class WorkerReady(Message, frozen=True, kw_only=True):
    """The model is loaded, its content is the fingerprint asked for, and the data socket listens."""

    memory_bytes: int
    description: str
    """One line for people: class, parameters, dtype, attention implementation."""


class LoadFailed(Message, frozen=True, kw_only=True):
    """The model cannot be served; the worker exits after this."""

    error: str
    content_changed: bool = False
    """True when the files on disk are no longer the fingerprint that was asked for."""


class Dropped(Message, frozen=True, kw_only=True):
    """No request of the job is computed or queued any more."""

    job_id: str


FromWorker = WorkerReady | LoadFailed | Dropped


# ---------------------------------------------------------------- evaluator -> worker (data channel)


class Hello(Message, frozen=True, kw_only=True):
    """First message on a data channel: the job whose requests follow. Answered by Welcome."""

    job_id: str


class GenerationOptions(Record, frozen=True, kw_only=True):
    """How to continue a prompt; the meaning is lm-eval's."""

    until: tuple[str, ...] = ()
    max_gen_toks: int = 256
    do_sample: bool = False
    kwargs: dict[str, Any] = {}
    """Everything else that transformers' GenerationConfig takes (temperature, top_p, num_beams…)."""


class LoglikelihoodChunk(Message, frozen=True, kw_only=True):
    """Score each continuation after its context: (context tokens, continuation tokens), neither empty."""

    chunk_id: int
    requests: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    batch_size: int | None = None
    """Most sequences in one forward pass; None: the worker decides ("auto")."""


class GenerationChunk(Message, frozen=True, kw_only=True):
    """Continue each prompt. `seeds[i]` seeds the sampling of prompt i, whatever it is batched with."""

    chunk_id: int
    prompts: tuple[tuple[int, ...], ...]
    options: GenerationOptions
    seeds: tuple[int, ...] = ()
    batch_size: int | None = None


ToWorkerData = Hello | LoglikelihoodChunk | GenerationChunk


# ---------------------------------------------------------------- worker -> evaluator (data channel)


class Welcome(Message, frozen=True, kw_only=True):
    """What an evaluator must know of the loaded model to cut requests."""

    worker_id: str
    max_length: int
    prefix_token_id: int
    dtype: str
    attn_implementation: str


class LoglikelihoodDone(Message, frozen=True, kw_only=True):
    """(sum of log-probabilities of the continuation, whether greedy decoding gives it), in request order."""

    chunk_id: int
    answers: tuple[tuple[float, bool], ...]
    seconds: float


class GenerationDone(Message, frozen=True, kw_only=True):
    """Texts as lm-eval's HF backend returns them: special tokens skipped, cut at the first stop string."""

    chunk_id: int
    texts: tuple[str, ...]
    seconds: float


class ChunkFailed(Message, frozen=True, kw_only=True):
    """The chunk raised; the worker lives on."""

    chunk_id: int
    error: str


FromWorkerData = Welcome | LoglikelihoodDone | GenerationDone | ChunkFailed

_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One message as msgpack, without the frame's length."""
    return _encoder.encode(message)


decode_to_evaluator = msgspec.msgpack.Decoder(ToEvaluator).decode
decode_from_evaluator = msgspec.msgpack.Decoder(FromEvaluator).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
decode_to_worker_data = msgspec.msgpack.Decoder(ToWorkerData).decode
decode_from_worker_data = msgspec.msgpack.Decoder(FromWorkerData).decode

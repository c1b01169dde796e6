"""What evalpool knows: jobs, evaluations, models, workers and devices, as frozen values without behaviour or I/O."""

from __future__ import annotations

import enum
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import msgspec

DEFAULT_CACHE_MAX_BYTES = 10 * 1024**3
"""Of the response cache's file."""
DEFAULT_SHARD_BYTES = 5_000_000_000
"""Of a merged checkpoint's weight files: what transformers writes by default, too."""
CheckpointType = Literal["regular", "ema"]
"""Which of the weights that a trainer saves: those that it trains, or their moving average."""


class JobState(enum.StrEnum):
    """Where a job is in its life; `gpu_pool.transitions` says which changes are allowed."""

    QUEUED = "queued"  # accepted and durable, waiting for an evaluator and a worker
    RUNNING = "running"  # an evaluator works on it
    CANCELLING = "cancelling"  # its processes are being ended; outside it still reads "running"
    COMPLETED = "completed"  # scores are stored
    FAILED = "failed"  # ended by an error, which is stored
    CANCELLED = "cancelled"  # ended by request, before it completed

    @property
    def is_final(self) -> bool:
        """Whether no further change can follow."""
        return self in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)


class Phase(enum.StrEnum):
    """What a running job is doing."""

    PREPARING = "preparing"  # loading documents, rendering and tokenising prompts
    EVALUATING = "evaluating"  # requests are with the workers
    SCORING = "scoring"  # metrics, standard errors, result files
    MERGING = "merging"  # the shards of a checkpoint become one; the phase of jobs that do nothing else


class WorkerState(enum.StrEnum):
    """Where a worker process is in its life. One whose process is gone is struck out; a replacement is a new worker."""

    STARTING = "starting"  # spawned, loading its model
    IDLE = "idle"  # model loaded, no job attached
    BUSY = "busy"  # at least one job attached
    STOPPING = "stopping"  # asked to end


class EvaluatorState(enum.StrEnum):
    """Where an evaluator process is in its life, as far as handing out jobs goes. One whose process is gone is struck
    out."""

    STARTING = "starting"  # spawned; it has not said yet that it is ready
    READY = "ready"  # it has nothing to do
    RUNNING = "running"  # it has a job
    CLEARING = "clearing"  # its job has ended; it has not said yet that it is ready for another
    ENDING = "ending"  # it is being killed: whatever it still says does not count


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values below: immutable, strict when decoded. (Type checkers want the keywords repeated in each.)"""


Modality = Literal["text", "image", "audio", "video"]
"""What a task shows or a model takes."""
TEXT_ONLY: frozenset[Modality] = frozenset({"text"})
"""What a model takes that is nothing but a language model."""


class ModelArgs(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Constructor arguments of a transformers model; names and meaning are those of lm-eval's HF backends.

    Those from `image_token_id` on are of its `hf-multimodal`: how images stand in prompts, and how large they are.
    `num_frames` is of lmms-eval's models of videos, `language` and `task` of its Whisper.
    """

    pretrained: str
    revision: str | None = None
    subfolder: str | None = None
    tokenizer: str | None = None
    use_fast_tokenizer: bool = True
    dtype: str = "auto"
    softmax_dtype: str | None = None
    attn_implementation: str | None = None
    max_length: int | None = None
    truncation: bool = False
    add_bos_token: bool | None = None
    prefix_token_id: int | None = None
    peft: str | None = None
    gguf_file: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_compute_dtype: str | None = None
    bnb_4bit_quant_type: str | None = None
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: str | None = None
    trust_remote_code: bool = False
    think_end_token: str | int | None = None
    enable_thinking: bool | None = None
    chat_template_args: dict[str, Any] | None = None
    image_token_id: int | None = None
    image_string: str | None = None
    interleave: bool = True
    max_images: int = 999
    convert_img_format: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_width: int | None = None
    image_height: int | None = None
    image_max_side: int | None = None
    num_frames: int = 8
    """Images that a video is shown as."""
    audio_string: str | None = None
    """What stands for a sound in a prompt without a chat template, as `image_string` for an image."""
    language: str | None = None
    """That a speech model is to write; None: as its generation_config.json says, or what it hears."""
    task: str | None = None
    """Of a speech model: "transcribe" or "translate"."""


Device = Literal["cpu", "cuda", "api"]
"""Where a model is computed; "api": behind an endpoint, elsewhere."""


class ApiModel(Record, frozen=True, kw_only=True):
    """A model behind an endpoint that the operator lists, and how one job asks it."""

    endpoint: str
    """The operator's name of it."""
    base_url: str
    kind: Literal["chat", "completions"]
    model: str
    """The endpoint's name of it."""
    num_concurrent: int
    """Most requests of the job at once."""
    max_retries: int
    timeout_s: float
    think_end_token: str | None = None
    is_cached: bool = False
    """Whether answers without sampling may come from the response cache."""


class ModelSpec(Record, frozen=True, kw_only=True, dict=True):
    """A model by its content. Two specs with the same `replica_key` can be served by one loaded replica."""

    kind: str
    args: ModelArgs
    fingerprint: str
    """sha256 hex over weights, adapter, config, tokenizer and template (see `gpu_pool.fingerprint`)."""
    device: Device = "cpu"
    api: ApiModel | None = None
    """Of a model behind an endpoint; `args` then say what is known of it here, such as its tokenizer."""

    @cached_property
    def replica_key(self) -> str:
        """Identity of a loaded replica: content, arguments and kind of device; not the path it was read from.

        One process asks an endpoint, for all jobs and whatever model.
        """
        if self.api is not None:
            return f"api:{self.api.endpoint}"
        args = msgspec.structs.replace(self.args, pretrained="", tokenizer=None, peft=None)
        return f"{self.fingerprint}:{self.device}:{msgspec.json.encode(args, order='sorted').decode()}"


class Evaluation(Record, frozen=True, kw_only=True):
    """One validated request: what to evaluate and how. Field names are those of `POST /evaluate`."""

    model: str
    tasks: tuple[str, ...]
    model_args: dict[str, Any] = {}
    num_fewshot: int | None = None
    batch_size: int | Literal["auto"] = "auto"
    device: str | None = None
    limit: int | float | None = None
    gen_kwargs: dict[str, Any] = {}
    log_samples: bool = True
    predict_only: bool = False
    num_gpus: int = 1
    merge: CheckpointType | None = None
    """The model is a sharded training checkpoint: merge it first, and evaluate these of its weights."""
    output_dir: str | None = None
    use_cache: bool = True
    deterministic: bool = False
    apply_chat_template: bool | str | None = None
    """None: as the task's library does. lm-eval's prompts are plain; lmms-eval's models generate by their template."""
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    random_seed: int | None = 0
    numpy_random_seed: int | None = 1234
    torch_random_seed: int | None = 1234
    fewshot_random_seed: int | None = 1234
    bootstrap_iters: int = 100_000
    priority: int = 0
    """Larger goes first."""
    timeout_s: float | None = None
    """Seconds that the job may run, in all its attempts together; waiting is not counted. A restart of the server
    begins them anew."""
    max_retries: int | None = None
    """Further attempts after its processes were lost in any way; None: as many as the operator allows."""
    max_error_share: float = 0.0
    """Share of its requests that may end in an error while it still completes."""
    tags: tuple[str, ...] = ()
    idempotency_key: str | None = None
    """Chosen by the client: the same key and request again mean the same job."""


class Merge(Record, frozen=True, kw_only=True):
    """One validated merge: a sharded training checkpoint becomes one that can be loaded. All paths are resolved."""

    checkpoint_path: str
    shards_path: str
    """The folder in it that holds the shards."""
    description_path: str
    """The folder in it that holds configuration and tokenizer."""
    output_path: str
    """The folder to be written; it may be the checkpoint itself."""
    checkpoint_type: CheckpointType = "regular"
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    """Most bytes of tensors in one file of weights, where no single one is larger."""
    priority: int = 0
    tags: tuple[str, ...] = ()


class TaskProgress(Record, frozen=True, kw_only=True):
    """Requests of one task, or bytes of a merge: done so far, and in all (0 until its requests are built)."""

    done: int = 0
    total: int = 0
    errored: int = 0
    """Requests that ended in an error instead of an answer (counted in `done` too)."""


class EngineRoute(Record, frozen=True, kw_only=True):
    """How a worker's engine computes the model."""

    route: str
    """Of the engine's `routes`: "tree" or "plain"; "api" where an endpoint computes."""
    reason: str


class Progress(Record, frozen=True, kw_only=True):
    """A running job's progress, as its process last reported it."""

    phase: Phase = Phase.PREPARING
    tasks: dict[str, TaskProgress] = {}
    cached: int = 0
    """Requests answered from the response cache (counted in `done` too)."""
    workers: dict[str, int] = {}
    """Requests answered by each worker, by worker id."""
    routes: tuple[EngineRoute, ...] = ()
    """How the workers' engines compute the model: one, unless they disagree."""
    waits_for: str | None = None
    """For people: what it cannot go on without, and somebody has to see to."""

    @property
    def done(self) -> int:
        return sum(task.done for task in self.tasks.values())

    @property
    def total(self) -> int:
        return sum(task.total for task in self.tasks.values())

    @property
    def errored(self) -> int:
        return sum(task.errored for task in self.tasks.values())


class JobResult(Record, frozen=True, kw_only=True):
    """Where a completed job's files are, and its scores."""

    model_name: str
    """lm-eval's sanitised model name: the key of the reference's `result`."""
    results_path: str
    samples: dict[str, str] = {}
    """Path of the samples file of each task; empty when `log_samples` is false."""
    metrics: dict[str, dict[str, Any]] = {}
    """Scores by task and group, in lm-eval's keys ("acc,none", "acc_stderr,none")."""
    errored: dict[str, int] = {}
    """Requests of each task that ended in an error, where there were any: their documents are not in its scores."""


class Job(Record, frozen=True, kw_only=True):
    """One job, as the store keeps it."""

    id: str
    work: Evaluation | Merge
    """What is to be done."""
    request: dict[str, Any]
    """The request as it was sent, with defaults filled in: what `GET /jobs/{id}` shows."""
    state: JobState = JobState.QUEUED
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    attempt: int = 0
    """Times its processes were started; a restart of the server adds one."""
    retries: int = 0
    """Attempts that were lost with their processes; those that ended with the server are not counted."""
    error: str | None = None
    model: ModelSpec | None = None
    progress: Progress | None = None
    metrics: dict[str, dict[str, Any]] = {}
    """Scores of the tasks that are done so far."""
    samples: dict[str, str] = {}
    """Samples files of the tasks that are done so far."""
    result: JobResult | None = None

    @property
    def evaluation(self) -> Evaluation:
        """The work of a job that is known to be an evaluation."""
        assert isinstance(self.work, Evaluation), f"job {self.id} is a merge"
        return self.work

    @property
    def idempotency_key(self) -> str | None:
        """What must not be submitted twice. A merge needs none: asked for twice at once it is one job anyway."""
        return self.work.idempotency_key if isinstance(self.work, Evaluation) else None


class Worker(Record, frozen=True, kw_only=True):
    """One worker process: a model replica bound to its slots for life."""

    id: str
    spec: ModelSpec
    slots: tuple[str, ...]
    memory_bytes: int = 0
    """What it may use of each of its slots; 0: the whole slot is its own."""
    state: WorkerState = WorkerState.STARTING
    jobs: frozenset[str] = frozenset()
    idle_since: float = 0.0
    """Monotonic seconds, meaningful while IDLE."""

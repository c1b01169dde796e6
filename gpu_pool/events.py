"""What the scheduler is told (events) and what it asks for (actions). Time is a field: the scheduler has no clock."""

from __future__ import annotations

from typing import Literal

from gpu_pool.hardware import Slot
from gpu_pool.losses import Losses
from gpu_pool.records import ModelSpec, Record


class Demand(Record, frozen=True, kw_only=True):
    """What a job needs, as far as scheduling is concerned."""

    job_id: str
    spec: ModelSpec
    max_replicas: int
    """Most workers it may hold at once (`num_gpus` // `gpus`); it starts with one and grows."""
    order: float
    """Submission time in seconds since the epoch; of equal priority the smaller goes first."""
    priority: int = 0
    """Larger goes first; `gpu_pool.order` says how it is weighed against waiting time."""
    gpus: int = 1
    """Slots that one replica takes, all or none."""
    memory_bytes: int = 0
    """What a replica needs of each of its slots; 0: the whole slot."""
    slot_index: str | None = None
    """Only the GPU at this position in PCI order ("cuda:N"), or None for any."""
    slot_id: str | None = None
    """Only this slot (a GPU or MIG instance by its UUID), or None for any."""
    timeout_s: float | None = None
    """Seconds that it may have a worker in all its attempts together; None: no limit."""
    ran_s: float = 0.0
    """Seconds that it had one in earlier attempts."""
    losses: Losses = Losses()
    """Its attempts so far that were lost with their processes."""
    max_retries: int | None = None
    """Further attempts after the first one; None: the operator's limit."""

    def accepts(self, slot: Slot) -> bool:
        """Whether a worker for this job may live in `slot`, once there is room."""
        return (
            slot.device == self.spec.device
            and self.slot_index in (None, slot.index)
            and self.slot_id in (None, slot.id)
            and (not slot.memory_bytes or self.memory_bytes <= slot.memory_bytes)
            and (self.gpus == 1 or not slot.is_mig)
        )


# ---------------------------------------------------------------- events


class Event(Record, frozen=True, kw_only=True):
    """Base of the events; `now` is monotonic seconds."""

    now: float


class JobSubmitted(Event, frozen=True, kw_only=True):
    """A job is durable and its model is known."""

    demand: Demand


class CancelRequested(Event, frozen=True, kw_only=True):
    """Someone wants the job gone."""

    job_id: str


class JobEnded(Event, frozen=True, kw_only=True):
    """Its evaluator reported the job as completed or failed."""

    job_id: str
    content_changed: bool = False
    """It failed because the model's files changed after it was submitted."""


class JobProgressed(Event, frozen=True, kw_only=True):
    """Further requests of the job are answered: what it lost so far did not stop it."""

    job_id: str
    done: int
    """In this attempt; those that the response cache answered are among them."""


class EvaluatorIsReady(Event, frozen=True, kw_only=True):
    """An evaluator has nothing to do: newly started, or done with its job."""

    evaluator_id: str


class EvaluatorDied(Event, frozen=True, kw_only=True):
    """An evaluator process is gone, killed by us or not."""

    evaluator_id: str
    cause: str
    from_outside: bool = False
    """Whether somebody else killed it, which says nothing of its job."""


class WorkerLoaded(Event, frozen=True, kw_only=True):
    """A worker's model is ready to serve."""

    worker_id: str


class WorkerLoadFailed(Event, frozen=True, kw_only=True):
    """A worker cannot serve its model and will exit."""

    worker_id: str
    error: str
    content_changed: bool = False
    crowded: bool = False
    """Whether it lacked memory on GPUs that others have come to use: elsewhere, or later, it may be served."""


class WorkerDied(Event, frozen=True, kw_only=True):
    """A worker process is gone, stopped by us or not."""

    worker_id: str
    cause: str
    from_outside: bool = False
    """As of an evaluator."""


class WorkerUnreachable(Event, frozen=True, kw_only=True):
    """The job's connection to a worker failed, and the worker's process has not turned out to be dead."""

    worker_id: str
    job_id: str
    cause: str


class WorkerDroppedJob(Event, frozen=True, kw_only=True):
    """A worker computes nothing of the job any more."""

    worker_id: str
    job_id: str


class WorkerGivenBack(Event, frozen=True, kw_only=True):
    """The job's evaluator has stopped using a worker, as a Detach asked that was not `at_once`."""

    worker_id: str
    job_id: str


class LeaseRefused(Event, frozen=True, kw_only=True):
    """A worker could not be started: its GPU was taken by someone else at the last moment."""

    worker_id: str
    reason: str


class SlotsSeen(Event, frozen=True, kw_only=True):
    """An inventory look: every slot that exists, and why it cannot be used now (None: it can)."""

    slots: tuple[tuple[Slot, str | None], ...]
    lost: frozenset[str] = frozenset()
    """Slots that cannot compute any more: workers there are killed, and their jobs go elsewhere."""
    contested: frozenset[str] = frozenset()
    """Slots whose memory someone else wants: workers without jobs there are stopped."""


class SlotsReturned(Event, frozen=True, kw_only=True):
    """What a dead worker held of its slots may be leased again (or SlotsSeen says why a slot may not)."""

    worker_id: str


class ModelsSeen(Event, frozen=True, kw_only=True):
    """A look at the files of the models that are in use."""

    changed: frozenset[str]
    """Replica keys of those that could not be loaded again as they are: files have changed or are gone."""


class Tick(Event, frozen=True, kw_only=True):
    """Time passed: look again at timeouts, idle workers, patience and growth."""


# ---------------------------------------------------------------- actions


class StartEvaluator(Record, frozen=True, kw_only=True):
    """Spawn an evaluator."""

    evaluator_id: str


class KillEvaluator(Record, frozen=True, kw_only=True):
    """End an evaluator and whatever it started, at once."""

    evaluator_id: str


class StartWorker(Record, frozen=True, kw_only=True):
    """Lease the slots and spawn a worker on them."""

    worker_id: str
    spec: ModelSpec
    slot_ids: tuple[str, ...]
    memory_bytes: int = 0
    """What it may use of each slot, beside other workers of ours; 0: the whole slot is its own."""


class StopWorker(Record, frozen=True, kw_only=True):
    """Ask a worker without jobs to end."""

    worker_id: str


class KillWorker(Record, frozen=True, kw_only=True):
    """End a worker with all its ranks, at once: it is on a GPU that is lost."""

    worker_id: str


class ReclaimSlots(Record, frozen=True, kw_only=True):
    """A worker is gone: watch its slots until the memory that it held is back, then say SlotsReturned."""

    worker_id: str
    slot_ids: tuple[str, ...]
    rest_s: float = 0.0
    """Not before so many seconds: somebody kills what is started there."""


class StartJob(Record, frozen=True, kw_only=True):
    """Give the job to this evaluator; workers follow by Attach."""

    job_id: str
    evaluator_id: str


class Attach(Record, frozen=True, kw_only=True):
    """Tell the job's evaluator to use this worker."""

    job_id: str
    evaluator_id: str
    worker_id: str


class Detach(Record, frozen=True, kw_only=True):
    """Tell the job's evaluator to use this worker no more."""

    job_id: str
    evaluator_id: str
    worker_id: str
    at_once: bool = True
    """True: it is gone. False: take its answers to what it was asked, then say WorkerGivenBack."""
    cause: str | None = None
    """How its process ended; None when it lives and is wanted elsewhere."""
    from_outside: bool = False
    """Whether somebody else killed it."""


class NoteLoss(Record, frozen=True, kw_only=True):
    """The job lost a worker and goes on, for now: part of its history."""

    job_id: str
    cause: str
    """Which worker, and why."""


class DropJob(Record, frozen=True, kw_only=True):
    """Tell a worker to forget the job, and see that it answers in time."""

    worker_id: str
    job_id: str


class ConcludeJob(Record, frozen=True, kw_only=True):
    """The job's evaluator reported its end: make it durable."""

    job_id: str


class SettleJob(Record, frozen=True, kw_only=True):
    """The job has reached an end that its evaluator did not report."""

    job_id: str
    outcome: Literal["cancelled", "failed"]
    error: str | None = None


class BeginCancel(Record, frozen=True, kw_only=True):
    """The job is being cancelled: its processes are on their way out."""

    job_id: str


class RequeueJob(Record, frozen=True, kw_only=True):
    """The job lost its processes and waits again."""

    job_id: str
    cause: str


class RefreshModel(Record, frozen=True, kw_only=True):
    """The job's model changed on disk before it was loaded: find its content anew and submit the job again."""

    job_id: str
    cause: str
    ran_s: float
    """As in the demand that the job is submitted with again."""


Action = (
    StartEvaluator
    | KillEvaluator
    | StartWorker
    | StopWorker
    | KillWorker
    | ReclaimSlots
    | StartJob
    | Attach
    | Detach
    | NoteLoss
    | DropJob
    | ConcludeJob
    | SettleJob
    | BeginCancel
    | RequeueJob
    | RefreshModel
)

"""What the scheduler is told (events) and what it asks for (actions). Time is a field: the scheduler has no clock."""

from __future__ import annotations

from typing import Literal

from gpu_pool.records import ModelSpec, Record, Slot


class Demand(Record, frozen=True, kw_only=True):
    """What a job needs, as far as scheduling is concerned."""

    job_id: str
    spec: ModelSpec
    max_replicas: int
    """Most workers it may hold at once (`num_gpus`); it starts with one and grows."""
    order: float
    """Submission time in seconds; smaller goes first."""
    slot_index: str | None = None
    """Only the GPU at this position in PCI order ("cuda:N"), or None for any."""
    attempts: int = 0
    """Times it was started before."""

    def accepts(self, slot: Slot) -> bool:
        """Whether a worker for this job may live in `slot`."""
        return slot.device == self.spec.device and self.slot_index in (None, slot.index)


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


class EvaluatorIsReady(Event, frozen=True, kw_only=True):
    """An evaluator has nothing to do: newly started, or done with its job."""

    evaluator_id: str


class EvaluatorDied(Event, frozen=True, kw_only=True):
    """An evaluator process is gone, killed by us or not."""

    evaluator_id: str
    cause: str


class WorkerLoaded(Event, frozen=True, kw_only=True):
    """A worker's model is ready to serve."""

    worker_id: str


class WorkerLoadFailed(Event, frozen=True, kw_only=True):
    """A worker cannot serve its model and will exit."""

    worker_id: str
    error: str
    content_changed: bool = False


class WorkerDied(Event, frozen=True, kw_only=True):
    """A worker process is gone, stopped by us or not."""

    worker_id: str
    cause: str


class WorkerDroppedJob(Event, frozen=True, kw_only=True):
    """A worker computes nothing of the job any more."""

    worker_id: str
    job_id: str


class LeaseRefused(Event, frozen=True, kw_only=True):
    """A worker could not be started: its GPU was taken by someone else at the last moment."""

    worker_id: str
    reason: str


class SlotsSeen(Event, frozen=True, kw_only=True):
    """An inventory look: every slot that exists, and why it cannot be used now (None: it can)."""

    slots: tuple[tuple[Slot, str | None], ...]


class SlotsReturned(Event, frozen=True, kw_only=True):
    """The memory of a dead worker is back: its slots may be leased again."""

    slot_ids: tuple[str, ...]


class Tick(Event, frozen=True, kw_only=True):
    """Time passed: look again whether a job should grow."""


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


class StopWorker(Record, frozen=True, kw_only=True):
    """Ask a worker without jobs to end."""

    worker_id: str


class ReclaimSlots(Record, frozen=True, kw_only=True):
    """A worker is gone: watch its slots until their memory is back, then say SlotsReturned."""

    slot_ids: tuple[str, ...]


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
    """Tell the job's evaluator that this worker is gone."""

    job_id: str
    evaluator_id: str
    worker_id: str


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


Action = (
    StartEvaluator
    | KillEvaluator
    | StartWorker
    | StopWorker
    | ReclaimSlots
    | StartJob
    | Attach
    | Detach
    | DropJob
    | ConcludeJob
    | SettleJob
    | BeginCancel
    | RequeueJob
    | RefreshModel
)

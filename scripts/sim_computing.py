"""Jobs and the workers that compute their chunks, one chunk at a time on each worker, taking turns between its jobs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Literal

import msgspec
from sim_clock import Clock, Meter
from sim_traces import TraceJob, TraceModel

Place = Literal["coming", "waiting", "running", "cancelling", "ended"]


class JobRecord(msgspec.Struct, kw_only=True):
    """What has become of a job."""

    trace: TraceJob
    left: int
    """Chunks that no worker has begun, or that were lost."""
    done: int = 0
    place: Place = "coming"
    started_s: float | None = None
    """When its first chunk began, or its scoring where there was no chunk."""
    ended_s: float | None = None
    outcome: str | None = None
    attempt: int = 0
    """What still runs of an earlier attempt does not count."""
    evaluator_id: str | None = None
    prepared: bool = False
    workers: set[str] = set()
    """Those that its evaluator uses."""
    reported_s: float = -math.inf
    """When its evaluator last said that it got on."""


class Chunk(msgspec.Struct, frozen=True, eq=False):
    """One that is being computed."""

    job_id: str
    attempt: int


class Replica(msgspec.Struct, kw_only=True):
    """A worker process."""

    model: TraceModel
    slots: tuple[str, ...]
    loaded: bool = False
    stopping: bool = False
    hanging: bool = False
    """Its GPU is lost: nothing of it ends any more."""
    turns: deque[str] = msgspec.field(default_factory=lambda: deque[str]())
    """Jobs that use it; the leftmost that has a chunk goes next."""
    running: Chunk | None = None
    given_back: set[str] = set()
    """Jobs that are detached from it but for their running chunk."""


class Computing:
    """All jobs and workers of a box."""

    def __init__(
        self,
        clock: Clock,
        meter: Meter,
        jobs: dict[str, JobRecord],
        on_progress: Callable[[JobRecord], None],
        on_given_back: Callable[[JobRecord, str], None],
    ) -> None:
        """`on_progress` is told of a job with another chunk done, `on_given_back` of one that has left a worker."""
        self.replicas: dict[str, Replica] = {}
        self._clock = clock
        self._meter = meter
        self._jobs = jobs
        self._on_progress = on_progress
        self._on_given_back = on_given_back

    def start(self, worker_id: str, replica: Replica) -> None:
        """A worker begins to load."""
        self.replicas[worker_id] = replica
        self._meter.loading += replica.model.gpus

    def loaded(self, worker_id: str) -> bool:
        """A worker has loaded; False when it is not there any more, or on its way out."""
        replica = self.replicas.get(worker_id)
        if replica is None or replica.stopping or replica.hanging:
            return False
        replica.loaded = True
        self._meter.loading -= replica.model.gpus
        return True

    def die(self, worker_id: str) -> bool:
        """A worker's process ends, and its running chunk is lost; False when it has ended before."""
        replica = self.replicas.pop(worker_id, None)
        if replica is None:
            return False
        if not replica.loaded and not replica.hanging:
            self._meter.loading -= replica.model.gpus
        for job_id in replica.turns:
            self._jobs[job_id].workers.discard(worker_id)
        self._break_off(replica)
        return True

    def hang(self, worker_id: str) -> None:
        """A worker's GPU is lost: until its process is ended, it only holds what it has."""
        replica = self.replicas[worker_id]
        if replica.hanging:
            return
        replica.hanging = True
        if not replica.loaded:
            self._meter.loading -= replica.model.gpus
        elif replica.running is not None:
            self._meter.computing -= replica.model.gpus

    def attach(self, record: JobRecord, worker_id: str) -> None:
        """Chunks of the job may begin there."""
        replica = self.replicas[worker_id]
        assert replica.loaded, "a job is attached to a worker that is not loaded"
        assert replica.model.name == record.trace.model, "a job is attached to a worker of another model"
        if record.trace.id not in replica.turns:
            replica.turns.append(record.trace.id)
        record.workers.add(worker_id)
        self._next_chunk(worker_id)

    def detach(self, record: JobRecord, worker_id: str, *, at_once: bool = True) -> None:
        """No further chunk of the job begins there; `at_once`: the running one is lost, else it ends first."""
        record.workers.discard(worker_id)
        replica = self.replicas.get(worker_id)
        if replica is None:
            return
        if record.trace.id in replica.turns:
            replica.turns.remove(record.trace.id)
        runs = replica.running is not None and replica.running.job_id == record.trace.id
        if not at_once:
            replica.given_back.add(record.trace.id)
            if not runs:
                self._give_back(worker_id, replica)
        elif runs:
            self._break_off(replica)
            self._next_chunk(worker_id)

    def _give_back(self, worker_id: str, replica: Replica) -> None:
        """Say of which jobs, none of whose chunks runs, it has nothing any more."""
        for job_id in sorted(replica.given_back):
            self._on_given_back(self._jobs[job_id], worker_id)
        replica.given_back.clear()

    def _break_off(self, replica: Replica) -> None:
        """The running chunk, if any, is lost."""
        chunk, replica.running = replica.running, None
        if chunk is None:
            return
        if not replica.hanging:
            self._meter.computing -= replica.model.gpus
        record = self._jobs[chunk.job_id]
        if record.attempt == chunk.attempt:
            record.left += 1
            self.wake(record)

    def wake(self, record: JobRecord) -> None:
        """The job has chunks to begin."""
        for worker_id in sorted(record.workers):
            self._next_chunk(worker_id)

    def _next_chunk(self, worker_id: str) -> None:
        """Begin a chunk of the next job that has one, unless another runs."""
        replica = self.replicas[worker_id]
        if replica.running is not None or replica.stopping or replica.hanging:
            return
        for _ in range(len(replica.turns)):
            job_id = replica.turns[0]
            replica.turns.rotate(-1)
            record = self._jobs[job_id]
            if record.prepared and record.left:
                record.left -= 1
                if record.started_s is None:
                    record.started_s = self._clock.now
                chunk = replica.running = Chunk(job_id, record.attempt)
                self._meter.computing += replica.model.gpus
                self._clock.after(record.trace.chunk_s, self._chunk_ended, worker_id, replica, chunk)
                return

    def _chunk_ended(self, worker_id: str, replica: Replica, chunk: Chunk) -> None:
        if replica.running is not chunk or replica.hanging:  # it was broken off, or never ends
            return
        replica.running = None
        self._meter.computing -= replica.model.gpus
        record = self._jobs[chunk.job_id]
        if record.attempt == chunk.attempt:
            record.done += 1
            self._on_progress(record)
        self._give_back(worker_id, replica)
        self._next_chunk(worker_id)

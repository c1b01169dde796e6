"""Who holds what: jobs, evaluators, workers and slots. Pure bookkeeping; decisions are the scheduler's.

Every job is in exactly one of three places: `waiting`, `running` or `cancelling`. Every slot is free, leased to one
worker, being reclaimed, or unusable. `check` states these invariants; the tests call it after every step.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gpu_pool.events import Demand
from gpu_pool.policy import View
from gpu_pool.records import Slot, Worker, WorkerState
from gpu_pool.transitions import WorkerEvent, advance_worker


class Running(msgspec.Struct, kw_only=True):
    """A job with an evaluator."""

    demand: Demand
    evaluator_id: str
    workers: list[str] = []
    """Workers it holds, loading ones too."""
    losses: int = 0
    """Workers that died under it."""
    may_grow: bool = True
    """False once a further replica failed to load: the next one would fail too."""


class Ledger:
    """The pool's books at time `now` (monotonic seconds)."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: dict[str, Demand] = {}
        self.running: dict[str, Running] = {}
        self.cancelling: dict[str, set[str]] = {}
        """Job -> the processes that still have to let go of it."""
        self.evaluators: dict[str, str | None] = {}
        """Evaluator -> its job; "" while it starts; None while it is ready."""
        self.workers: dict[str, Worker] = {}
        self.slots: dict[str, Slot] = {}
        self.unusable: dict[str, str] = {}
        """Slot -> why the last look at the hardware ruled it out."""
        self.reclaiming: set[str] = set()
        self.load_seconds: dict[str, float] = {}
        self.loading_since: dict[str, float] = {}
        self.shared_since: dict[str, float] = {}
        """Worker -> since when more than one job uses it."""

    def leased(self) -> dict[str, str]:
        """Slot -> the worker that holds it."""
        return {slot: worker.id for worker in self.workers.values() for slot in worker.slots}

    def check(self) -> None:
        """Raise AssertionError when an invariant is broken."""
        places = [*self.waiting, *self.running, *self.cancelling]
        assert len(places) == len(set(places)), "a job is in two places"
        leases = [slot for worker in self.workers.values() for slot in worker.slots]
        assert len(leases) == len(set(leases)), "a slot is leased twice"
        assert not self.reclaiming & set(leases), "a slot is leased while it is being reclaimed"
        for job_id, run in self.running.items():
            assert self.evaluators.get(run.evaluator_id) == job_id, "a running job has lost its evaluator"
            for worker_id in run.workers:
                assert job_id in self.workers[worker_id].jobs, "a job and its worker disagree"
        for worker in self.workers.values():
            for job_id in worker.jobs:
                assert worker.id in self.running[job_id].workers, "a worker and its job disagree"
            if worker.state is WorkerState.IDLE:
                assert not worker.jobs, "an idle worker has a job"

    def coming(self) -> list[str]:
        """Slots on their way back: of workers that were asked to end, or whose memory is not free yet."""
        stopping = [worker for worker in self.workers.values() if worker.state is WorkerState.STOPPING]
        return [*(slot for worker in stopping for slot in worker.slots), *sorted(self.reclaiming)]

    def sharing_for(self, run: Running) -> float:
        """Seconds for which others have used every worker of the job; 0 when one is its own."""
        return min((self.now - self.shared_since.get(worker_id, self.now) for worker_id in run.workers), default=0.0)

    def view(self) -> View:
        """What the policy chooses from."""
        taken = self.leased().keys() | self.reclaiming | self.unusable.keys()
        free = frozenset(self.slots.keys() - taken)
        return View(workers=self.workers, slots=self.slots, free=free, load_seconds=self.load_seconds)

    def update_worker(self, worker_id: str, **changes: Any) -> None:
        """Change fields of a worker."""
        worker = self.workers[worker_id] = msgspec.structs.replace(self.workers[worker_id], **changes)
        if len(worker.jobs) > 1:
            self.shared_since.setdefault(worker_id, self.now)
        else:
            self.shared_since.pop(worker_id, None)

    def forget_worker(self, worker_id: str) -> Worker | None:
        """Strike out a worker that is gone; returns what was known of it."""
        self.loading_since.pop(worker_id, None)
        self.shared_since.pop(worker_id, None)
        return self.workers.pop(worker_id, None)

    def release(self, worker_id: str, job_id: str) -> None:
        """The job does not use the worker any more."""
        worker = self.workers[worker_id]
        jobs = worker.jobs - {job_id}
        state = worker.state
        if not jobs and state is WorkerState.BUSY:
            state = advance_worker(state, WorkerEvent.RELEASE)
        self.update_worker(worker_id, jobs=jobs, state=state, idle_since=self.now)
        if (run := self.running.get(job_id)) and worker_id in run.workers:
            run.workers.remove(worker_id)

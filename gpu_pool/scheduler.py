"""The scheduler: events in, actions out. It touches no process, socket, clock or file.

Read it from below: `records` and `transitions` are the nouns, `order` says which job goes first, `ledger` keeps the
books, `placement` says where a replica could live, `moves` are what decisions are made of, `candidates` are the waiting
jobs that are worth a look, `placer` decides who gets what, and this module writes down what happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from gpu_pool import events as ev
from gpu_pool.ledger import Ending, Running
from gpu_pool.placer import PATIENCE_SECONDS, Placer
from gpu_pool.records import WorkerState
from gpu_pool.transitions import WorkerEvent, advance_worker

MAX_FAILED_STARTS = 5
"""Workers in a row that may die while they load before their job fails, or more where it may have more attempts;
chance kills some, a bad model kills all."""
MAX_LOSSES = 30
"""Workers that may die under a job without any progress in between. Its evaluator needs about log2(requests in a chunk)
of them to find one request that kills, and reports by itself what it cannot go on from."""
SPARE_EVALUATORS = 8
"""Evaluators that are started before jobs ask for them (no more than one for each slot, and one more)."""
SHARING_EVALUATORS = 4
"""Further evaluators for each GPU: their jobs share its replica, which computes for some while others prepare."""


class Scheduler(Placer):
    """The pool's decisions. `step` takes one event and returns the actions that follow, in order."""

    def __init__(
        self,
        *,
        evaluators: int | None,
        max_attempts: int,
        evaluators_that_fit: int | None = None,
        max_workers_per_gpu: int = 1,
        max_gpus: int | None = None,
        idle_worker_s: float | None = None,
        patience_s: float = PATIENCE_SECONDS,
    ) -> None:
        """`evaluators` is how many jobs may run at once. None: one for each slot, one more, and SHARING_EVALUATORS for
        each GPU, those as far as the machine's memory goes, which `evaluators_that_fit` says (None: for all).

        A job is started `max_attempts` times unless it says otherwise; a worker is stopped after `idle_worker_s`
        without a job."""
        super().__init__(max_workers_per_gpu=max_workers_per_gpu, max_gpus=max_gpus, patience_s=patience_s)
        self._evaluators_asked = evaluators
        self._evaluators_that_fit = evaluators_that_fit
        self._max_attempts = max_attempts
        self._idle_worker_s = idle_worker_s

    # ------------------------------------------------------------------ the face

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Take one event; return what must be done, in order."""
        self.now = event.now
        self._handlers[type(event)](self, event)
        if not isinstance(event, ev.JobProgressed):  # the most frequent one leaves nothing to decide
            self._keep_evaluators()
            self.place()
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------------ jobs

    def _on_submitted(self, event: ev.JobSubmitted) -> None:
        self.waiting.add(event.demand)

    def _on_progressed(self, event: ev.JobProgressed) -> None:
        if run := self.running.get(event.job_id):
            run.losses = 0

    def _on_cancel(self, event: ev.CancelRequested) -> None:
        if self.waiting.pop(event.job_id):
            self._do(ev.SettleJob(job_id=event.job_id, outcome="cancelled"))
        elif run := self.running.get(event.job_id):
            self._do(ev.BeginCancel(job_id=event.job_id))
            self._end(run, "cancelled")

    def _on_job_ended(self, event: ev.JobEnded) -> None:
        if run := self.running.get(event.job_id):
            del self.running[event.job_id]
            if event.content_changed:
                self._refresh(run)
            else:
                self._do(ev.ConcludeJob(job_id=event.job_id))
            ran = run.ran(self.now)
            self.run_seconds = ran if self.run_seconds is None else 0.9 * self.run_seconds + 0.1 * ran
            self._release_all(run)

    def _abandon(self, run: Running) -> None:
        """Take a running job out of its place and end its evaluator; its workers are the caller's to release."""
        del self.running[run.demand.job_id]
        self._do(ev.KillEvaluator(evaluator_id=run.evaluator_id))
        self.evaluators[run.evaluator_id] = ""  # not ready, and no job's any more

    def _refresh(self, run: Running) -> None:
        """Have a job begin with what its model's files hold now: its scores are all of one content."""
        when = f"while it paused for job {run.paused_for}" if run.paused_for else "before they were loaded"
        self._do(ev.RefreshModel(job_id=run.demand.job_id, cause=f"the model's files changed {when}"))

    def _release_all(self, run: Running) -> None:
        for worker_id in list(run.workers):
            self.release(run, worker_id)

    def _end(self, run: Running, outcome: Literal["cancelled", "failed"], error: str | None = None) -> None:
        """End a running job: its evaluator is killed and its workers drop it; settled when all have let go."""
        job_id = run.demand.job_id
        self._abandon(run)
        ending = self.ending[job_id] = Ending(holders={run.evaluator_id}, outcome=outcome, error=error)
        for worker_id in list(run.workers):
            if self.workers[worker_id].state is WorkerState.BUSY:
                ending.holders.add(worker_id)
                self._do(ev.DropJob(worker_id=worker_id, job_id=job_id))
            self.release(run, worker_id)

    def _let_go(self, process_id: str, job_id: str | None = None) -> None:
        """This process holds nothing of the job (of any job) that is ending."""
        for ended in [job_id] if job_id is not None else list(self.ending):
            ending = self.ending.get(ended)
            if ending is None:
                continue
            ending.holders.discard(process_id)
            if not ending.holders:
                del self.ending[ended]
                self._do(ev.SettleJob(job_id=ended, outcome=ending.outcome, error=ending.error))

    def _requeue(self, run: Running, cause: str) -> None:
        """A running job lost its evaluator: it waits again, or has failed too often."""
        del self.running[run.demand.job_id]
        self._release_all(run)
        demand = msgspec.structs.replace(run.demand, attempts=run.demand.attempts + 1)
        if demand.attempts >= self._most_attempts(demand):
            times = "once" if demand.attempts == 1 else f"{demand.attempts} times"
            self._do(ev.SettleJob(job_id=demand.job_id, outcome="failed", error=f"{cause} ({times})"))
        else:
            self.waiting.add(demand)
            self._do(ev.RequeueJob(job_id=demand.job_id, cause=cause))

    def _most_attempts(self, demand: ev.Demand) -> int:
        return self._max_attempts if demand.max_retries is None else demand.max_retries + 1

    # ------------------------------------------------------------------ evaluators

    def _on_evaluator_ready(self, event: ev.EvaluatorIsReady) -> None:
        if event.evaluator_id not in self.evaluators:
            return
        if self.evaluators[event.evaluator_id]:  # it has run a job: it is the last in this order, and chosen first
            del self.evaluators[event.evaluator_id]
        self.evaluators[event.evaluator_id] = None

    def _on_evaluator_died(self, event: ev.EvaluatorDied) -> None:
        job_id = self.evaluators.pop(event.evaluator_id, None)
        self._let_go(event.evaluator_id)
        if job_id and (run := self.running.get(job_id)):
            self._requeue(run, f"the evaluator process ended: {event.cause}")

    def _most_evaluators(self) -> int:
        """How many there may be, by default, when all slots have jobs."""
        sharing = SHARING_EVALUATORS * sum(1 for slot in self.slots.values() if slot.device == "cuda")
        least, most = len(self.slots) + 1, len(self.slots) + 1 + sharing
        return most if self._evaluators_that_fit is None else max(least, min(most, self._evaluators_that_fit))

    def _keep_evaluators(self) -> None:
        asked = self._evaluators_asked
        limit, alone = (self._most_evaluators(), len(self.slots) + 1) if asked is None else (asked, asked)
        wanted = min(limit, max(min(alone, SPARE_EVALUATORS), len(self.running) + len(self.waiting)))
        while len(self.evaluators) < wanted:
            evaluator_id = self._new_id("evaluator")
            self.evaluators[evaluator_id] = ""
            self._do(ev.StartEvaluator(evaluator_id=evaluator_id))

    # ------------------------------------------------------------------ workers

    def _on_worker_loaded(self, event: ev.WorkerLoaded) -> None:
        worker = self.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STARTING:
            return
        self.note_load(worker.id)
        self.update_worker(worker.id, state=advance_worker(worker.state, WorkerEvent.LOADED), idle_since=self.now)
        if worker.jobs:
            self.update_worker(worker.id, state=advance_worker(WorkerState.IDLE, WorkerEvent.ATTACH))
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            run.failed_starts = 0
            self.works(run)
            self._do(ev.Attach(job_id=job_id, evaluator_id=run.evaluator_id, worker_id=worker.id))
            self._trim(run)

    def _on_load_failed(self, event: ev.WorkerLoadFailed) -> None:
        worker = self.workers.get(event.worker_id)
        if worker is None:
            return
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            self.release(run, worker.id)
            if event.crowded:
                continue  # it gets another worker where others leave room
            if run.workers:
                run.may_grow = False
            elif event.content_changed:
                self._abandon(run)
                self._refresh(run)
            elif run.paused_for:
                self._end(run, "failed", f"it had paused for job {run.paused_for}, and then {event.error}")
            else:
                self._end(run, "failed", event.error)
        self._stop(worker.id)

    def _on_worker_died(self, event: ev.WorkerDied) -> None:
        worker = self.forget_worker(event.worker_id, reclaim=True)
        if worker is None:
            return
        self._do(ev.ReclaimSlots(worker_id=worker.id, slot_ids=worker.slots, memory_bytes=worker.memory_bytes))
        self._let_go(worker.id)
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            self.release(run, worker.id)
            if worker.state is WorkerState.STARTING:
                self._count_failed_start(run, event.cause)
            else:
                self._detach(run, worker.id, at_once=True, cause=event.cause)
                self._count_loss(run, event.cause)

    def _count_failed_start(self, run: Running, cause: str) -> None:
        run.failed_starts += 1
        if run.failed_starts >= MAX_FAILED_STARTS:
            if run.workers:
                run.may_grow = False
            elif run.failed_starts >= self._most_attempts(run.demand):
                error = f"its worker process ended while it loaded the model: {cause} ({run.failed_starts} times)"
                self._end(run, "failed", error)

    def _count_loss(self, run: Running, cause: str) -> None:
        run.losses += 1
        if run.losses >= MAX_LOSSES:
            error = f"its worker processes ended {run.losses} times without progress in between; the last: {cause}"
            self._end(run, "failed", error)

    def _on_dropped(self, event: ev.WorkerDroppedJob) -> None:
        self._let_go(event.worker_id, event.job_id)

    def _on_given_back(self, event: ev.WorkerGivenBack) -> None:
        run = self.running.get(event.job_id)
        if run and event.worker_id in run.returning:
            self.release(run, event.worker_id)

    def _on_lease_refused(self, event: ev.LeaseRefused) -> None:
        worker = self.forget_worker(event.worker_id, reclaim=False)
        if worker is None:
            return
        for reasons in (self.unusable, self.refused):
            reasons.update(dict.fromkeys(worker.slots, event.reason))
        for job_id in sorted(worker.jobs):
            self.release(self.running[job_id], worker.id)

    # ------------------------------------------------------------------ slots

    def _on_slots_seen(self, event: ev.SlotsSeen) -> None:
        self.see(event.slots, closed=event.lost | event.contested)
        for worker in list(self.workers.values()):
            if not event.lost.isdisjoint(worker.slots):
                self._kill(worker.id)
            elif not event.contested.isdisjoint(worker.slots) and not worker.jobs:
                self._stop(worker.id)

    def _on_slots_returned(self, event: ev.SlotsReturned) -> None:
        self.return_slots(event.worker_id)

    def _on_models_seen(self, event: ev.ModelsSeen) -> None:
        self.changed = event.changed

    # ------------------------------------------------------------------ time

    def _on_tick(self, event: ev.Tick) -> None:
        for run in list(self.running.values()):
            limit = run.demand.timeout_s
            if limit is not None and run.ran(self.now) > limit:
                self._end(run, "failed", f"it ran for longer than its timeout_s of {limit:g} s")
        if self._idle_worker_s is not None:
            for worker in list(self.workers.values()):
                if worker.state is WorkerState.IDLE and self.now - worker.idle_since > self._idle_worker_s:
                    self._stop(worker.id)

    _handlers: dict[type[ev.Event], Callable[[Scheduler, Any], None]] = {
        ev.JobSubmitted: _on_submitted,
        ev.JobProgressed: _on_progressed,
        ev.CancelRequested: _on_cancel,
        ev.JobEnded: _on_job_ended,
        ev.EvaluatorIsReady: _on_evaluator_ready,
        ev.EvaluatorDied: _on_evaluator_died,
        ev.WorkerLoaded: _on_worker_loaded,
        ev.WorkerLoadFailed: _on_load_failed,
        ev.WorkerDied: _on_worker_died,
        ev.WorkerDroppedJob: _on_dropped,
        ev.WorkerGivenBack: _on_given_back,
        ev.LeaseRefused: _on_lease_refused,
        ev.SlotsSeen: _on_slots_seen,
        ev.SlotsReturned: _on_slots_returned,
        ev.ModelsSeen: _on_models_seen,
        ev.Tick: _on_tick,
    }

"""The scheduler: events in, actions out. It touches no process, socket, clock or file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from gpu_pool import events as ev
from gpu_pool.ledger import Ledger, Running
from gpu_pool.policy import Choice, first_worker, next_worker
from gpu_pool.records import ModelSpec, Worker, WorkerState
from gpu_pool.transitions import WorkerEvent, advance_worker


class Scheduler(Ledger):
    """The pool's decisions. `step` takes one event and returns the actions that follow, in order."""

    def __init__(self, *, evaluators: int, max_attempts: int) -> None:
        super().__init__()
        self._evaluator_target = evaluators
        self._max_attempts = max_attempts
        self._counter = 0
        self._actions: list[ev.Action] = []

    # ------------------------------------------------------------------ the face

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Take one event; return what must be done, in order."""
        self.now = event.now
        self._handlers[type(event)](self, event)
        self._keep_evaluators()
        self._place()
        actions, self._actions = self._actions, []
        return actions

    # ------------------------------------------------------------------ jobs

    def _on_submitted(self, event: ev.JobSubmitted) -> None:
        self.waiting[event.demand.job_id] = event.demand

    def _on_cancel(self, event: ev.CancelRequested) -> None:
        job_id = event.job_id
        if self.waiting.pop(job_id, None):
            self._do(ev.SettleJob(job_id=job_id, outcome="cancelled"))
        elif run := self.running.get(job_id):
            self._do(ev.BeginCancel(job_id=job_id))
            self._abandon(run)
            self.cancelling[job_id] = {run.evaluator_id}
            for worker_id in list(run.workers):
                if self.workers[worker_id].state is WorkerState.BUSY:
                    self.cancelling[job_id].add(worker_id)
                    self._do(ev.DropJob(worker_id=worker_id, job_id=job_id))
                self.release(worker_id, job_id)

    def _on_job_ended(self, event: ev.JobEnded) -> None:
        if run := self.running.pop(event.job_id, None):
            kind = ev.RefreshModel if event.content_changed else ev.ConcludeJob
            self._do(kind(job_id=event.job_id))
            for worker_id in list(run.workers):
                self.release(worker_id, event.job_id)

    def _abandon(self, run: Running) -> None:
        """Take a running job out of its place and end its evaluator; its workers are the caller's to release."""
        del self.running[run.demand.job_id]
        self._do(ev.KillEvaluator(evaluator_id=run.evaluator_id))
        self.evaluators[run.evaluator_id] = ""  # not ready, and no job's any more

    def _fail(self, run: Running, error: str) -> None:
        self._abandon(run)
        for worker_id in list(run.workers):
            self.release(worker_id, run.demand.job_id)
        self._do(ev.SettleJob(job_id=run.demand.job_id, outcome="failed", error=error))

    def _requeue(self, run: Running, cause: str) -> None:
        demand = msgspec.structs.replace(run.demand, attempts=run.demand.attempts + 1)
        for worker_id in list(run.workers):
            self.release(worker_id, demand.job_id)
        if demand.attempts >= self._max_attempts:
            self._do(ev.SettleJob(job_id=demand.job_id, outcome="failed", error=f"{cause} ({demand.attempts} times)"))
        else:
            self.waiting[demand.job_id] = demand
            self._do(ev.RequeueJob(job_id=demand.job_id, cause=cause))

    def _let_go(self, process_id: str, job_id: str | None = None) -> None:
        """This process holds nothing of the job (of any job) that is being cancelled."""
        for cancelled in [job_id] if job_id is not None else list(self.cancelling):
            holders = self.cancelling.get(cancelled)
            if holders is None:
                continue
            holders.discard(process_id)
            if not holders:
                del self.cancelling[cancelled]
                self._do(ev.SettleJob(job_id=cancelled, outcome="cancelled"))

    # ------------------------------------------------------------------ evaluators

    def _on_evaluator_ready(self, event: ev.EvaluatorIsReady) -> None:
        if event.evaluator_id in self.evaluators:
            self.evaluators[event.evaluator_id] = None

    def _on_evaluator_died(self, event: ev.EvaluatorDied) -> None:
        job_id = self.evaluators.pop(event.evaluator_id, None)
        self._let_go(event.evaluator_id)
        if job_id and (run := self.running.pop(job_id, None)):
            self._requeue(run, f"the evaluator process ended: {event.cause}")

    def _keep_evaluators(self) -> None:
        while len(self.evaluators) < self._evaluator_target:
            evaluator_id = self._new_id("evaluator")
            self.evaluators[evaluator_id] = ""
            self._do(ev.StartEvaluator(evaluator_id=evaluator_id))

    # ------------------------------------------------------------------ workers

    def _on_worker_loaded(self, event: ev.WorkerLoaded) -> None:
        worker = self.workers.get(event.worker_id)
        if worker is None or worker.state is not WorkerState.STARTING:
            return
        self.load_seconds[worker.spec.replica_key] = self.now - self.loading_since.pop(worker.id)
        self.update_worker(worker.id, state=advance_worker(worker.state, WorkerEvent.LOADED), idle_since=self.now)
        if worker.jobs:
            self.update_worker(worker.id, state=advance_worker(WorkerState.IDLE, WorkerEvent.ATTACH))
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            self._do(ev.Attach(job_id=job_id, evaluator_id=run.evaluator_id, worker_id=worker.id))
            self._trim(run)

    def _on_load_failed(self, event: ev.WorkerLoadFailed) -> None:
        worker = self.workers.get(event.worker_id)
        if worker is None:
            return
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            self.release(worker.id, job_id)
            if run.workers:
                run.may_grow = False
            elif event.content_changed:
                self._abandon(run)
                self._do(ev.RefreshModel(job_id=job_id))
            else:
                self._fail(run, event.error)
        self._stop(worker.id)

    def _on_worker_died(self, event: ev.WorkerDied) -> None:
        worker = self.forget_worker(event.worker_id)
        if worker is None:
            return
        self.reclaiming.update(worker.slots)
        self._do(ev.ReclaimSlots(slot_ids=worker.slots))
        self._let_go(worker.id)
        for job_id in sorted(worker.jobs):
            run = self.running[job_id]
            run.workers.remove(worker.id)
            run.losses += 1
            if run.losses >= self._max_attempts:
                self._fail(run, f"its worker process ended: {event.cause} ({run.losses} times)")
            elif worker.state is not WorkerState.STARTING:
                self._do(ev.Detach(job_id=job_id, evaluator_id=run.evaluator_id, worker_id=worker.id))

    def _on_dropped(self, event: ev.WorkerDroppedJob) -> None:
        self._let_go(event.worker_id, event.job_id)

    def _on_lease_refused(self, event: ev.LeaseRefused) -> None:
        worker = self.forget_worker(event.worker_id)
        if worker is None:
            return
        for slot in worker.slots:
            self.unusable[slot] = event.reason
        for job_id in worker.jobs:
            self.running[job_id].workers.remove(worker.id)

    def _trim(self, run: Running) -> None:
        """Give up the most shared of a job's loaded workers while it has more than its cap."""
        while len(run.workers) > run.demand.max_replicas:
            busiest = max(run.workers, key=lambda worker_id: (len(self.workers[worker_id].jobs), worker_id))
            self.release(busiest, run.demand.job_id)
            detach = ev.Detach(job_id=run.demand.job_id, evaluator_id=run.evaluator_id, worker_id=busiest)
            self._do(detach)

    def _stop(self, worker_id: str) -> None:
        worker = self.workers[worker_id]
        if worker.state is not WorkerState.STOPPING:
            self.update_worker(worker_id, state=advance_worker(worker.state, WorkerEvent.STOP))
            self._do(ev.StopWorker(worker_id=worker_id))

    # ------------------------------------------------------------------ slots

    def _on_slots_seen(self, event: ev.SlotsSeen) -> None:
        held = self.leased().keys() | self.reclaiming
        self.slots = {slot_id: self.slots[slot_id] for slot_id in held} | {slot.id: slot for slot, _ in event.slots}
        self.unusable = {slot.id: reason for slot, reason in event.slots if reason is not None}

    def _on_slots_returned(self, event: ev.SlotsReturned) -> None:
        self.reclaiming.difference_update(event.slot_ids)

    def _on_tick(self, event: ev.Tick) -> None:
        """Placement, which follows every event, is all there is to do."""

    # ------------------------------------------------------------------ placement

    def _place(self) -> None:
        """Jobs that lost their workers first, then waiting ones by age, then growth onto what nobody waits for."""
        coming = self.coming()
        starved: list[ev.Demand] = []
        for run in list(self.running.values()):
            if not run.workers and not self._apply(first_worker(run.demand, self.view()), run, coming):
                starved.append(run.demand)
        for demand in sorted(self.waiting.values(), key=lambda demand: demand.order):
            evaluator_id = next((key for key, job in self.evaluators.items() if job is None), None)
            if evaluator_id is None:
                break
            if not self._begin(demand, evaluator_id, coming):
                starved.append(demand)
        for run in list(self.running.values()):
            if run.may_grow and not any(demand.spec.device == run.demand.spec.device for demand in starved):
                self._grow(run, coming)

    def _begin(self, demand: ev.Demand, evaluator_id: str, coming: list[str]) -> bool:
        run = Running(demand=demand, evaluator_id=evaluator_id)
        choice = first_worker(demand, self.view())
        if choice.use is None and choice.start_in is None:
            self._make_room(choice, demand, coming)
            return False
        del self.waiting[demand.job_id]
        self.running[demand.job_id] = run
        self.evaluators[evaluator_id] = demand.job_id
        self._do(ev.StartJob(job_id=demand.job_id, evaluator_id=evaluator_id))
        return self._apply(choice, run, coming)

    def _grow(self, run: Running, coming: list[str]) -> None:
        while True:
            choice = next_worker(run.demand, run.workers, self.sharing_for(run), self.view())
            if not self._apply(choice, run, coming):
                return

    def _apply(self, choice: Choice, run: Running, coming: list[str]) -> bool:
        """Carry a choice out for a running job; returns whether it got a worker."""
        job_id = run.demand.job_id
        if choice.use is not None:
            worker = self.workers[choice.use]
            run.workers.append(worker.id)
            self.update_worker(worker.id, jobs=worker.jobs | {job_id})
            if worker.state is WorkerState.IDLE:
                self.update_worker(worker.id, state=advance_worker(worker.state, WorkerEvent.ATTACH))
            if worker.state is not WorkerState.STARTING:
                self._do(ev.Attach(job_id=job_id, evaluator_id=run.evaluator_id, worker_id=worker.id))
                self._trim(run)
            return True
        if choice.start_in is not None:
            worker_id = self._start_worker(run.demand.spec, choice.start_in)
            self.update_worker(worker_id, jobs=frozenset({job_id}))
            run.workers.append(worker_id)
            return True
        self._make_room(choice, run.demand, coming)
        return False

    def _make_room(self, choice: Choice, demand: ev.Demand, coming: list[str]) -> None:
        """Count on a slot that is coming back already, or evict for one."""
        for slot_id in coming:
            if slot_id in self.slots and demand.accepts(self.slots[slot_id]):
                coming.remove(slot_id)
                return
        if choice.evict is not None:
            self._stop(choice.evict)

    def _start_worker(self, spec: ModelSpec, slot_id: str) -> str:
        worker_id = self._new_id("worker")
        self.workers[worker_id] = Worker(id=worker_id, spec=spec, slots=(slot_id,), idle_since=self.now)
        self.loading_since[worker_id] = self.now
        self._do(ev.StartWorker(worker_id=worker_id, spec=spec, slot_ids=(slot_id,)))
        return worker_id

    # ------------------------------------------------------------------ small change

    def _new_id(self, kind: str) -> str:
        self._counter += 1
        return f"{kind}-{self._counter}"

    def _do(self, action: ev.Action) -> None:
        self._actions.append(action)

    _handlers: dict[type[ev.Event], Callable[[Scheduler, Any], None]] = {
        ev.JobSubmitted: _on_submitted,
        ev.CancelRequested: _on_cancel,
        ev.JobEnded: _on_job_ended,
        ev.EvaluatorIsReady: _on_evaluator_ready,
        ev.EvaluatorDied: _on_evaluator_died,
        ev.WorkerLoaded: _on_worker_loaded,
        ev.WorkerLoadFailed: _on_load_failed,
        ev.WorkerDied: _on_worker_died,
        ev.WorkerDroppedJob: _on_dropped,
        ev.LeaseRefused: _on_lease_refused,
        ev.SlotsSeen: _on_slots_seen,
        ev.SlotsReturned: _on_slots_returned,
        ev.Tick: _on_tick,
    }

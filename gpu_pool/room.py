"""Making room for jobs: taking what is free, and having others end, give back or pause, slots kept meanwhile. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_pool.events import Demand
from gpu_pool.ledger import Ledger, Running
from gpu_pool.moves import Moves
from gpu_pool.order import AGEING_SECONDS
from gpu_pool.placement import Plan, Readiness
from gpu_pool.records import Worker, WorkerState


class Room:
    """Carries out what the placer has decided."""

    def __init__(self, ledger: Ledger, moves: Moves, patience_s: float) -> None:
        """Who has paused is left alone for `patience_s` seconds of work."""
        self._ledger = ledger
        self._moves = moves
        self._patience_s = patience_s
        self._awaited: dict[str, frozenset[str]] = {}
        """By job that slots are held for, the jobs that could not pause for it when that was first so."""

    def take(self, run: Running, choice: Worker | Plan) -> bool:
        """Let the job have this worker, or one in these slots; False when they are not free."""
        if isinstance(choice, Plan):
            if choice.readiness is not Readiness.NOW:
                return False
            self._ledger.attach(run, self._moves.start_worker(run.demand, choice.slots))
            return True
        self._ledger.attach(run, choice.id)
        if choice.state is not WorkerState.STARTING:
            self._moves.attach(run, choice.id)
            self._moves.trim(run)
        return True

    def keep(self, slot_ids: Iterable[str], demand: Demand) -> None:
        """Let nobody else onto these slots for the rest of this pass."""
        self._ledger.slots.promised.update(dict.fromkeys(slot_ids, demand.job_id))

    def make(self, plan: Plan, demand: Demand) -> None:
        """Have what is in the way of a plan stopped or given back, and keep its slots from others."""
        self.keep(plan.slots, demand)
        for worker_id in plan.stop:
            self._moves.stop(worker_id)
        for worker_id in plan.give_back:
            self._moves.give_back(worker_id)

    def hold(self, plan: Plan, demand: Demand, since: float, *, may_pause: bool) -> bool:
        """Keep from others, for a job that has waited since then, what jobs have to leave first; True when they pause.

        They pause as soon as a slot of the plan is idle, if they `may_pause` now. Nothing is kept while one of them is
        too important to pause, or has just paused, or while a slot cannot be used at all: the slots would not become
        free together. Of a job whose model could not be loaded again only its own slots are kept until it ends: the
        others would be idle for as long. That is done for those that are there when it is first so, and for none that
        came later, or it might never end.
        """
        busy = [self._ledger.workers[worker_id] for worker_id in plan.busy]
        if wide := next((worker for worker in busy if len(worker.slots) >= len(plan.slots)), None):
            self.keep(wide.slots, demand)  # when its jobs end there is room: nothing is gained by a pause
            return False
        weight = demand.priority + (self._ledger.now - since) / AGEING_SECONDS
        if not all(self._may_pause(self._ledger.running[job_id], weight) for worker in busy for job_id in worker.jobs):
            return False
        if any(slot_id in self._ledger.slots.unusable for slot_id in plan.slots):
            return False
        fixed = [worker for worker in busy if worker.spec.replica_key in self._ledger.changed]
        if self._are_awaited(fixed, demand):
            self.keep((slot_id for worker in fixed for slot_id in worker.slots), demand)
            return False
        some_are_idle = any(self._is_idle(slot_id) for slot_id in plan.slots)
        self.keep((*plan.slots, *(slot_id for worker in busy for slot_id in worker.slots)), demand)
        if not may_pause:
            return False
        self.make(plan, demand)
        if fixed or not some_are_idle:
            return False
        for worker in busy:
            for job_id in worker.jobs:
                self._ledger.running[job_id].paused_for = demand.job_id
            self._moves.take_back(worker.id)
        return True

    def _are_awaited(self, fixed: list[Worker], demand: Demand) -> bool:
        """Whether one of the jobs is there still that could not pause when that was first so."""
        if not fixed:
            return False
        jobs = frozenset(job_id for worker in fixed for job_id in worker.jobs)
        return not jobs.isdisjoint(self._awaited.setdefault(demand.job_id, jobs))

    def forget_others(self) -> None:
        """Only jobs without workers are waited for."""
        ledger = self._ledger
        for job_id in list(self._awaited):
            run = ledger.running.get(job_id)
            if job_id not in ledger.waiting and (run is None or run.workers):
                del self._awaited[job_id]

    def _may_pause(self, run: Running, weight: float) -> bool:
        """Not for a job of less weight, its priority and what its waiting adds to that; nor again before it has worked
        for a while, loading not counted."""
        if run.demand.priority > weight:
            return False
        if run.interrupted is None:
            return True
        return run.working_since is not None and self._ledger.now - run.working_since >= self._patience_s

    def _is_idle(self, slot_id: str) -> bool:
        """Whether the slot is free, or its workers have no jobs. (What is on its way out may yet keep its memory.)"""
        holders = [self._ledger.workers.get(worker_id) for worker_id in self._ledger.slots.holders.get(slot_id, ())]
        return all(worker and not worker.jobs and worker.state is not WorkerState.STOPPING for worker in holders)

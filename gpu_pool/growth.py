"""Running jobs grow: further workers for those below their cap, on what nobody else takes. Pure.

It costs those that wait little, since whatever a job has beside its last worker it gives back at the end of a chunk.
So a slot is barred only while it is promised, or while an evaluator is about to be ready for a job that could start.
"""

from __future__ import annotations

import heapq

from gpu_pool.ledger import SOON_READY, Ledger, Running
from gpu_pool.order import NoRoom
from gpu_pool.placement import Plan, Readiness, any_in_reach, find_plan, replicas_for
from gpu_pool.records import Worker
from gpu_pool.room import Room

UNKNOWN_LOAD_SECONDS = 10.0
"""Assumed cost of loading a model that has never been loaded here."""


class Growth:
    """What is left at the end of a pass, for those that run."""

    def __init__(self, ledger: Ledger, room: Room) -> None:
        self._ledger = ledger
        self._room = room
        self._no_room = NoRoom()
        """Running jobs that have found no slots in this pass."""
        self._unused = [worker for worker in ledger.workers.values() if self._is_unused(worker)]
        self._unused_models = {worker.spec.replica_key for worker in self._unused}

    def grow(self) -> None:
        """One worker at a time to the job that has fewest, until nobody can use what is left."""
        if not self._anything_is_left():
            return
        running = self._ledger.running
        line = [(len(run.workers), run.rank, job_id) for job_id, run in running.items() if self._may_grow(run)]
        barred = self._barred() if line else set[str]()
        line = [each for each in line if running[each[2]].demand.spec.device not in barred]
        heapq.heapify(line)
        while line:
            count, its_rank, job_id = heapq.heappop(line)
            run = running[job_id]
            choice = self._next_choice(run, count)
            if choice is not None:
                if not self._room.take(run, choice):
                    assert isinstance(choice, Plan)
                    self._room.make(choice, run.demand)
                heapq.heappush(line, (count + 1, its_rank, job_id))

    def _is_unused(self, worker: Worker) -> bool:
        return not worker.jobs and worker.id not in self._ledger.leaving and self._is_left(worker.slots)

    def _is_left(self, slot_ids: tuple[str, ...]) -> bool:
        return self._ledger.slots.promised.keys().isdisjoint(slot_ids)

    def _anything_is_left(self) -> bool:
        """Whether any slot could get a worker, or any worker a job; mostly not, and there is no more to do."""
        ledger = self._ledger
        if self._unused or ledger.max_workers_per_gpu > 1:
            return True
        return any(not ledger.slots.holders.get(slot) and self._is_left((slot,)) for slot in ledger.slots)

    def _may_grow(self, run: Running) -> bool:
        """Whether it is below its cap, or at its cap with nothing of its own."""
        if not run.workers or not run.may_grow:
            return False
        return len(run.workers) < run.demand.max_replicas or self._only_shares(run)

    def _only_shares(self, run: Running) -> bool:
        return all(len(self._ledger.workers[worker_id].jobs) > 1 for worker_id in run.workers)

    def _barred(self) -> set[str]:
        """Kinds of device on which a waiting job could start in a moment, when an evaluator is ready for it."""
        barred: set[str] = set()
        if self._ledger.evaluators_that_are(*SOON_READY):
            for demand in self._ledger.waiting.first_of_each_kind():
                if demand.spec.device not in barred and any_in_reach(demand.spec.device, self._ledger):
                    plan = find_plan(demand, self._ledger, name_busy=False)
                    if plan is not None and plan.readiness is not Readiness.BUSY:
                        barred.add(demand.spec.device)
        return barred

    def _next_choice(self, run: Running, count: int) -> Worker | Plan | None:
        """A running job's further worker when it has or is promised `count`, or its own one instead of a shared one.

        Below its cap it takes unused replicas, then free slots, then the slot of an unused replica of another model. At
        its cap, when others have used all it has for as long as loading takes, it moves to a replica of its own.
        """
        demand = run.demand
        if count >= demand.max_replicas and (count > len(run.workers) or not self._only_shares(run)):
            return None
        if demand.spec.replica_key in self._unused_models:
            for worker in replicas_for(demand, self._ledger, self._ledger.slots.promised):
                if not worker.jobs and worker.id not in run.workers:
                    return worker
        if demand in self._no_room:
            return None
        plan = find_plan(demand, self._ledger, apart=run.workers)
        if plan is None or plan.readiness not in (Readiness.NOW, Readiness.UNUSED):
            if self._ledger.max_workers_per_gpu == 1:
                self._no_room.add(demand)  # else another job may find room beside others, where this one is already
            return None
        if count < demand.max_replicas:
            return plan
        patience = self._ledger.load_seconds.get(demand.spec.replica_key, UNKNOWN_LOAD_SECONDS)
        return plan if plan.readiness is Readiness.NOW and self._ledger.sharing_for(run) > patience else None

"""Two schedulers to compare with: the same events in and actions out, without anything that makes ours a pool."""

from __future__ import annotations

from collections import deque

import msgspec

from gpu_pool import events as ev


class Held(msgspec.Struct, kw_only=True):
    """A running job and its own workers."""

    demand: ev.Demand
    evaluator_id: str
    workers: list[str] = []


class Fifo:
    """Jobs in the order of submission to free GPUs; every job loads its model anew and ends its workers.

    A job begins as soon as the first in the queue has GPUs for one replica, takes as many as are free then up to its
    cap, and does not grow. No job passes another one. Cancelling and faults are not handled: it is for traces without.
    """

    def __init__(self, evaluators: int | None) -> None:
        """`evaluators`: jobs that may run at once; None: one more than there are slots."""
        self._evaluators = evaluators
        self._started = 0
        self._ready: list[str] = []
        self._queue: deque[ev.Demand] = deque()
        self.running: dict[str, Held] = {}
        self._slots: dict[str, tuple[str, ...]] = {}
        """Worker -> its slots, until they are back."""
        self._all: set[str] = set()
        self._taken: set[str] = set()
        self._count = 0

    def step(self, event: ev.Event) -> list[ev.Action]:
        """Take one event; return what must be done, in order."""
        actions: list[ev.Action] = []
        match event:
            case ev.JobSubmitted(demand=demand):
                self._queue.append(demand)
            case ev.EvaluatorIsReady(evaluator_id=evaluator_id):
                self._ready.append(evaluator_id)
            case ev.JobEnded(job_id=job_id):
                held = self.running.pop(job_id)
                actions.append(ev.ConcludeJob(job_id=job_id))
                actions += [ev.StopWorker(worker_id=worker_id) for worker_id in held.workers]
            case ev.WorkerLoaded(worker_id=worker_id):
                actions += self._attach(worker_id)
            case ev.WorkerDied(worker_id=worker_id):
                actions.append(ev.ReclaimSlots(worker_id=worker_id, slot_ids=self._slots[worker_id]))
            case ev.SlotsReturned(worker_id=worker_id):
                self._taken.difference_update(self._slots.pop(worker_id))
            case ev.SlotsSeen(slots=slots):
                self._all = {slot.id for slot, _ in slots}
            case ev.Tick() | ev.JobProgressed():
                pass
            case _:
                raise NotImplementedError(f"{type(event).__name__} does not happen in traces for comparison")
        while self._started < (len(self._all) + 1 if self._evaluators is None else self._evaluators):
            self._started += 1
            actions.append(ev.StartEvaluator(evaluator_id=self._new_id("evaluator")))
        while self._queue and self._ready and (begun := self._begin(self._queue[0])):
            self._queue.popleft()
            actions += begun
        return actions

    def may_begin(self) -> bool:
        """Whether another job may begin beside those that run."""
        return True

    def _begin(self, demand: ev.Demand) -> list[ev.Action]:
        """Evaluator and workers for the job; nothing when there are no GPUs for one."""
        free = sorted(slot_id for slot_id in self._all - self._taken if demand.slot_id in (None, slot_id))
        replicas = min(demand.max_replicas, len(free) // demand.gpus)
        if not replicas or not self.may_begin():
            return []
        evaluator_id = self._ready.pop(0)
        held = self.running[demand.job_id] = Held(demand=demand, evaluator_id=evaluator_id)
        actions: list[ev.Action] = [ev.StartJob(job_id=demand.job_id, evaluator_id=evaluator_id)]
        for number in range(replicas):
            slots = tuple(free[number * demand.gpus : (number + 1) * demand.gpus])
            worker_id = self._new_id("worker")
            held.workers.append(worker_id)
            self._slots[worker_id] = slots
            self._taken.update(slots)
            actions.append(ev.StartWorker(worker_id=worker_id, spec=demand.spec, slot_ids=slots))
        return actions

    def _attach(self, worker_id: str) -> list[ev.Action]:
        for job_id, held in self.running.items():
            if worker_id in held.workers:
                return [ev.Attach(job_id=job_id, evaluator_id=held.evaluator_id, worker_id=worker_id)]
        return []

    def _new_id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count}"


class OneAtATime(Fifo):
    """The reference's way: the box has one job at a time, and every job begins cold."""

    def may_begin(self) -> bool:
        return not self.running and not self._taken

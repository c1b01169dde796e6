"""Which workers a job gets: pure choices over a view of the pool, made for one job at a time, oldest first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from gpu_pool.events import Demand
from gpu_pool.records import Slot, Worker, WorkerState

UNKNOWN_LOAD_SECONDS = 10.0
"""Assumed cost of loading a model that has never been loaded here."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do for a job: use this worker, start one in this slot, or end this one for its slot; or nothing."""

    use: str | None = None
    start_in: str | None = None
    evict: str | None = None


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The pool at one moment."""

    workers: Mapping[str, Worker]
    slots: Mapping[str, Slot]
    free: frozenset[str]
    """Slots that can be leased now."""
    load_seconds: Mapping[str, float]
    """Measured loading time by replica key."""

    def replicas(self, demand: Demand) -> list[Worker]:
        """Live workers that serve the job's model where the job may run, least loaded first."""
        found = [
            worker
            for worker in self.workers.values()
            if worker.spec.replica_key == demand.spec.replica_key
            and worker.state in (WorkerState.STARTING, WorkerState.IDLE, WorkerState.BUSY)
            and all(demand.accepts(self.slots[slot]) for slot in worker.slots)
        ]
        return sorted(found, key=lambda worker: (worker.state is WorkerState.STARTING, len(worker.jobs), worker.id))

    def free_slot(self, demand: Demand) -> str | None:
        """A free slot for the job, the first in order."""
        return min((slot for slot in self.free if demand.accepts(self.slots[slot])), default=None)

    def idlest(self, demand: Demand) -> str | None:
        """The worker of another model that has been without a job for longest, in a slot that the job accepts."""
        unused = [
            worker
            for worker in self.workers.values()
            if not worker.jobs
            and worker.state in (WorkerState.STARTING, WorkerState.IDLE)
            and worker.spec.replica_key != demand.spec.replica_key
            and all(demand.accepts(self.slots[slot]) for slot in worker.slots)
        ]
        return min(unused, key=lambda worker: (worker.idle_since, worker.id)).id if unused else None


def first_worker(demand: Demand, view: View) -> Choice:
    """A job without a worker: an idle replica, else a busy one that is loaded, else a free slot, else an eviction.

    A loaded replica is shared rather than another one started: a small job is done before a model is loaded. A job that
    outlives the loading time is spread by `next_worker`.
    """
    replicas = view.replicas(demand)
    loaded = [worker for worker in replicas if worker.state is not WorkerState.STARTING]
    if loaded:
        return Choice(use=loaded[0].id)
    if slot := view.free_slot(demand):
        return Choice(start_in=slot)
    if replicas:
        return Choice(use=replicas[0].id)
    return Choice(evict=view.idlest(demand))


def next_worker(demand: Demand, held: Iterable[str], sharing_for: float, view: View) -> Choice:
    """A running job's further worker, or its own one instead of a shared one.

    Below its cap it takes idle replicas, then free slots, then the slot of an idle replica of another model. At its
    cap, when others have used all it has for as long as loading takes, it moves to a replica of its own.
    """
    mine = set(held)
    if len(mine) >= demand.max_replicas:
        return _own_worker(demand, mine, sharing_for, view)
    unused = [worker for worker in view.replicas(demand) if worker.id not in mine and not worker.jobs]
    if unused:
        return Choice(use=unused[0].id)
    if slot := view.free_slot(demand):
        return Choice(start_in=slot)
    return Choice(evict=view.idlest(demand))


def _own_worker(demand: Demand, mine: set[str], sharing_for: float, view: View) -> Choice:
    if not all(len(view.workers[worker].jobs) > 1 for worker in mine):
        return Choice()
    unused = [worker for worker in view.replicas(demand) if worker.id not in mine and not worker.jobs]
    if unused:
        return Choice(use=unused[0].id)
    patience = view.load_seconds.get(demand.spec.replica_key, UNKNOWN_LOAD_SECONDS)
    return Choice(start_in=view.free_slot(demand)) if sharing_for > patience else Choice()

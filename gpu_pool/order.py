"""The order in which waiting jobs go, and waiting lines that keep it. Pure.

A job's effective priority grows while it waits, so that nothing starves behind a stream of more important jobs:

    effective priority = priority + seconds waited / AGEING_SECONDS

All jobs age at the same pace: of two, the same one stays ahead for ever. So it is enough to sort them once, by a rank
that does not change with time (smaller goes first):

    rank = time of submission - AGEING_SECONDS * priority
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from gpu_pool.events import Demand

AGEING_SECONDS = 600.0
"""Waiting this much longer outweighs one step of priority."""

Entry = tuple[float, str]
"""(rank, job id): ids settle ties, so that any two jobs have an order."""

Shape = tuple[str, str | None, str | None, int, int]
"""What a new replica asks of the box: device, index, id, number of slots, GiB of each. Equal shapes fit equally."""

_GIB = 1 << 30


def rank(submitted: float, priority: int) -> float:
    """Where a job stands among those that wait; `submitted` in seconds. Smaller goes first."""
    return submitted - AGEING_SECONDS * priority


def shape_of(demand: Demand) -> Shape:
    """Jobs of one shape need the same of the box, whatever their models are; memory is rounded up to GiB."""
    gib = -(-demand.memory_bytes // _GIB)
    return demand.spec.device, demand.slot_index, demand.slot_id, demand.gpus, gib


class Line:
    """Job ids by rank. Adding, removing and asking for a position take microseconds at 10,000 jobs."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._ranks: dict[str, float] = {}

    def add(self, job_id: str, rank: float) -> None:
        """Put a job in its place; it must not be there yet."""
        self._ranks[job_id] = rank
        insort(self._entries, (rank, job_id))

    def discard(self, job_id: str) -> None:
        """Take a job out, if it is there."""
        rank = self._ranks.pop(job_id, None)
        if rank is not None:
            del self._entries[bisect_left(self._entries, (rank, job_id))]

    def after(self, entry: Entry | None) -> Entry | None:
        """The first job behind `entry`, or the first of all."""
        index = 0 if entry is None else bisect_right(self._entries, entry)
        return self._entries[index] if index < len(self._entries) else None

    def position(self, job_id: str) -> int | None:
        """How many go before this job; None when it is not in the line."""
        rank = self._ranks.get(job_id)
        return None if rank is None else bisect_left(self._entries, (rank, job_id))

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._ranks

    def __iter__(self) -> Iterator[str]:
        return (job_id for _, job_id in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class WaitingJobs:
    """Demands of the jobs that wait: in one line for all, one for each model and shape, and the firsts of these.

    Of jobs of one shape that need a new replica only the first has to be looked at: where it does not fit, none does.
    """

    def __init__(self) -> None:
        self._demands: dict[str, Demand] = {}
        self._all = Line()
        self.by_model: dict[str, dict[Shape, Line]] = {}
        """By replica key, then by shape."""
        self.firsts: dict[Shape, Line] = {}
        """By shape, the first job of each model."""

    def add(self, demand: Demand) -> None:
        """A job waits."""
        self.pop(demand.job_id)
        self._demands[demand.job_id] = demand
        shape, its_rank = shape_of(demand), rank(demand.order, demand.priority)
        line = self.by_model.setdefault(demand.spec.replica_key, {}).setdefault(shape, Line())
        before = line.after(None)
        self._all.add(demand.job_id, its_rank)
        line.add(demand.job_id, its_rank)
        self._keep_first(shape, before, line.after(None))

    def pop(self, job_id: str) -> Demand | None:
        """A job waits no more; None when it did not."""
        demand = self._demands.pop(job_id, None)
        if demand is None:
            return None
        shape, key = shape_of(demand), demand.spec.replica_key
        line = self.by_model[key][shape]
        before = line.after(None)
        self._all.discard(job_id)
        line.discard(job_id)
        self._keep_first(shape, before, line.after(None))
        if not line:
            del self.by_model[key][shape]
        if not self.by_model[key]:
            del self.by_model[key]
        return demand

    def _keep_first(self, shape: Shape, before: Entry | None, after: Entry | None) -> None:
        """The first job of a model and shape was `before`, and is `after`."""
        if before == after:
            return
        firsts = self.firsts.setdefault(shape, Line())
        if before is not None:
            firsts.discard(before[1])
        if after is not None:
            firsts.add(after[1], after[0])
        if not firsts:
            del self.firsts[shape]

    def position(self, job_id: str) -> int | None:
        """How many go before this job; None when it does not wait."""
        return self._all.position(job_id)

    def get(self, job_id: str) -> Demand | None:
        """The demand of a waiting job."""
        return self._demands.get(job_id)

    def __getitem__(self, job_id: str) -> Demand:
        return self._demands[job_id]

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._demands

    def __iter__(self) -> Iterator[str]:
        """Job ids, the next one first."""
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._demands)

    def values(self) -> Iterator[Demand]:
        """Demands, the next one first."""
        return (self._demands[job_id] for job_id in self._all)

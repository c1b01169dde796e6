"""The order in which waiting jobs go, and waiting lines that keep it. Pure.

A job's effective priority grows while it waits, so that nothing starves behind a stream of more important jobs:

    effective priority = priority + seconds waited / AGEING_SECONDS

All jobs age at the same pace: of two, the same one stays ahead for ever. So it is enough to sort them once, by a rank
that does not change with time (smaller goes first):

    rank = time of submission - AGEING_SECONDS * priority
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

from gpu_pool.events import Demand

AGEING_SECONDS = 600.0
"""Waiting this much longer outweighs one step of priority."""

Entry = tuple[float, str]
"""(rank, job id): ids settle ties, so that any two jobs have an order."""

Kind = tuple[str, str | None, str | None, int, bool]
"""What a new replica asks of the box beside memory: device, index, id, number of slots, whether its memory is known.
Of one kind, what needs less memory fits wherever what needs more does."""

Shape = tuple[Kind, int]
"""With the bytes that it needs of each slot. Equal shapes fit equally."""


def rank(submitted: float, priority: int) -> float:
    """Where a job stands among those that wait; `submitted` in seconds. Smaller goes first."""
    return submitted - AGEING_SECONDS * priority


def kind_of(demand: Demand) -> Kind:
    """Jobs of one kind differ for the box by their memory alone, whatever their models are."""
    return demand.spec.device, demand.slot_index, demand.slot_id, demand.gpus, demand.memory_bytes > 0


def shape_of(demand: Demand) -> Shape:
    """Jobs of one shape need the same of the box."""
    return kind_of(demand), demand.memory_bytes


class NoRoom:
    """Demands that found no room, and with each all of its kind that need as much memory or more."""

    def __init__(self) -> None:
        self._least: dict[Kind, int] = {}

    def add(self, demand: Demand) -> None:
        """There is no room for this one."""
        if demand not in self:
            self._least[kind_of(demand)] = demand.memory_bytes

    def least(self, kind: Kind) -> float:
        """The least memory that was too much; infinite where none was."""
        return self._least.get(kind, math.inf)

    def clear(self) -> None:
        """Things have changed."""
        self._least.clear()

    def __contains__(self, demand: Demand) -> bool:
        return bool(self._least) and demand.memory_bytes >= self.least(kind_of(demand))


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

    Of jobs of one model and shape that need a new replica only the first has to be looked at: where it does not fit,
    none does.
    """

    def __init__(self) -> None:
        self._demands: dict[str, Demand] = {}
        self._all = Line()
        self.by_model: dict[str, dict[Shape, Line]] = {}
        """By replica key, then by shape."""
        self.firsts: dict[Kind, Line] = {}
        """By kind, the first job of each model and shape."""
        self._memory: dict[Kind, list[int]] = {}
        """By kind, what those need, ascending."""

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
        kind, memory_bytes = shape
        firsts, memory = self.firsts.setdefault(kind, Line()), self._memory.setdefault(kind, [])
        if before is not None:
            firsts.discard(before[1])
            del memory[bisect_left(memory, memory_bytes)]
        if after is not None:
            firsts.add(after[1], after[0])
            insort(memory, memory_bytes)
        if not firsts:
            del self.firsts[kind], self._memory[kind]

    def first_of_each_kind(self) -> Iterator[Demand]:
        """The next job of each kind."""
        return (self._demands[entry[1]] for line in self.firsts.values() if (entry := line.after(None)))

    def least_memory(self, kind: Kind) -> int:
        """What the least demanding of a kind needs of each slot; some job of that kind waits."""
        return self._memory[kind][0]

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

"""Waiting jobs that are worth a look, in the order in which they are served, without looking at all of them. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection

from gpu_pool.events import Demand
from gpu_pool.heads import Heads
from gpu_pool.ledger import Ledger
from gpu_pool.order import Entry, Line, NoRoom, shape_of
from gpu_pool.placement import any_in_reach, replicas_for
from gpu_pool.records import Worker, WorkerState

NOWHERE: Entry = (math.inf, "")
"""Behind all jobs."""


class Candidates:
    """Merges the lines of models that have replicas, and of all others the first jobs by kind, by rank.

    `next` gives one job after another; `close` says that there is no room for the last one, and so for none that needs
    as much. A job that finds a loaded and unused replica of its model goes as if it had waited `bonus` seconds longer,
    which spares a loading; one that would only share a replica with others goes as if it had come `bonus` seconds
    later, since evaluators are scarce and others may make use of a GPU of their own.

    On a box that is full, which is the usual one where many wait, a job without a replica can become a head at best.
    There all behind the last head are left out at once, whatever they need.
    """

    def __init__(
        self, ledger: Ledger, heads: Heads, taken: Collection[str], skip: Collection[str], bonus: float
    ) -> None:
        """Replicas on slots in `taken` do not count; jobs in `skip` are left out."""
        self._ledger = ledger
        self._heads = heads
        self._waiting = ledger.waiting
        self._taken = taken
        self._seen = set(skip)
        self._bonus = bonus
        self._kinds = list(self._waiting.firsts)
        """Of the first lines, those of models without a replica."""
        self._lines = list(self._waiting.firsts.values())
        self._heap: list[tuple[float, Entry, int]] = []
        """(rank, with the bonus if there is one; rank and job; number of its line), the first of each line."""
        self._no_room = NoRoom()
        self._ends: dict[str, Entry] = {}
        """By kind of device, from where on jobs without a replica are left out."""
        self._last: Demand | None = None
        for device in {kind[0] for kind in self._kinds}:
            self._see_end(device)
        for number in range(len(self._kinds)):
            self._push(number, None)
        for key in ledger.replicas:
            for line in self._waiting.by_model.get(key, {}).values():
                self._add(line, None)

    def next(self) -> Demand | None:
        """The next job; None when there is none left that could be helped."""
        while self._heap:
            place, entry, number = heapq.heappop(self._heap)
            demand = self._waiting.get(entry[1])
            if demand is not None and demand.job_id not in self._seen:
                replicas = self._replicas(number, demand)
                if place < self._place(entry, replicas):  # another job took the replica, or a slot
                    heapq.heappush(self._heap, (self._place(entry, replicas), entry, number))
                    continue
                if replicas or (entry < self._end(demand.spec.device) and demand not in self._no_room):
                    self._push(number, entry)
                    self._seen.add(demand.job_id)
                    self._last = demand
                    if self._is_cold(number):  # those behind it may share what it gets
                        self._add(self._waiting.by_model[demand.spec.replica_key][shape_of(demand)], entry)
                    return demand
                if not self._is_cold(number):  # those behind it are of the same model and need as much
                    continue
            self._push(number, entry)
        return None

    def close(self) -> None:
        """There is no room for what `next` gave last."""
        assert self._last is not None
        self._no_room.add(self._last)
        if self._last.slot_id is None and self._last.slot_index is None:  # else there may well be other slots
            self._see_end(self._last.spec.device)

    def _see_end(self, device: str) -> None:
        """See whether there is no room on this kind of device for anyone without a replica, in the rest of the pass."""
        head = self._heads.last(device, self._ledger.now)
        if head is not None and not any_in_reach(device, self._ledger):
            self._ends[device] = (head.rank, head.demand.job_id)
            self._heap = [each for each in self._heap if not self._is_left_out(each[1], each[2])]
            heapq.heapify(self._heap)

    def _is_left_out(self, entry: Entry, number: int) -> bool:
        """Whether no job of a line from this one on has to be looked at, none being of a model with a replica."""
        return self._is_cold(number) and entry >= self._end(self._kinds[number][0])

    def _end(self, device: str) -> Entry:
        return self._ends.get(device, NOWHERE)

    def _is_cold(self, number: int) -> bool:
        """Whether the jobs of a line are of models without a replica."""
        return number < len(self._kinds)

    def _add(self, line: Line, after: Entry | None) -> None:
        self._lines.append(line)
        self._push(len(self._lines) - 1, after)

    def _push(self, number: int, after: Entry | None) -> None:
        """Put the first one behind `after` that could be helped into the heap."""
        line = self._lines[number]
        entry = line.after(after)
        if entry and self._is_cold(number):
            kind = self._kinds[number]
            end = self._end(kind[0])
            if self._no_room.least(kind) <= self._waiting.least_memory(kind):
                return  # the usual case: all need the same, and there is no need to look at each
            while entry and entry < end and self._is_given_up(self._waiting[entry[1]]):
                entry = line.after(entry)
            if entry and entry < end:
                heapq.heappush(self._heap, (entry[0], entry, number))
        elif entry:
            demand = self._waiting[entry[1]]
            replicas = self._replicas(number, demand)
            if replicas or entry < self._end(demand.spec.device):
                heapq.heappush(self._heap, (self._place(entry, replicas), entry, number))

    def _is_given_up(self, demand: Demand) -> bool:
        """Whether a first job is passed over: its model has a replica, and so its own line, or there is no room."""
        return demand.spec.replica_key in self._ledger.replicas or demand in self._no_room

    def _replicas(self, number: int, demand: Demand) -> list[Worker]:
        return [] if self._is_cold(number) else replicas_for(demand, self._ledger, self._taken)

    def _place(self, entry: Entry, replicas: list[Worker]) -> float:
        if not replicas:
            return entry[0]
        unused = replicas[0].state is WorkerState.IDLE
        return entry[0] - self._bonus if unused else entry[0] + self._bonus

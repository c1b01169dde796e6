"""Waiting jobs that are worth a look, in the order in which they are served, without looking at all of them. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from gpu_pool.events import Demand
from gpu_pool.ledger import Ledger
from gpu_pool.order import Entry, Line, shape_of
from gpu_pool.placement import replicas_for
from gpu_pool.records import WorkerState


class Candidates:
    """Merges the lines of models that have replicas, and of all others the first jobs by shape, by rank.

    `next` gives one job after another; `close` says that the last one could not be helped, and neither can those behind
    it in its line. A job that finds a loaded and unused replica of its model goes as if it had waited `bonus` seconds
    longer, which spares a loading; one that would only share a replica with others goes as if it had come `bonus`
    seconds later, since evaluators are scarce and others may make use of a GPU of their own.
    """

    def __init__(self, ledger: Ledger, taken: Collection[str], skip: Collection[str], bonus: float) -> None:
        """Replicas on slots in `taken` do not count; jobs in `skip` are left out."""
        self._ledger = ledger
        self._taken = taken
        self._seen = set(skip)
        self._bonus = bonus
        self._lines = list(ledger.waiting.firsts.values())
        self._cold = len(self._lines)
        """So many of the lines, the first ones, are of models without a replica."""
        self._heap: list[tuple[float, Entry, int]] = []
        """(rank, with the bonus if there is one; rank and job; number of its line), the first of each line."""
        self._closed: set[int] = set()
        self._last = 0
        for number in range(self._cold):
            self._push(number, None)
        for key in ledger.replicas:
            for line in ledger.waiting.by_model.get(key, {}).values():
                self._add(line, None)

    def next(self) -> Demand | None:
        """The next job; None when there is none left that could be helped."""
        while self._heap:
            place, entry, number = heapq.heappop(self._heap)
            demand = self._ledger.waiting.get(entry[1])
            if number in self._closed:
                continue
            if demand is not None and place < self._place(number, entry):  # another job took the replica, or a slot
                heapq.heappush(self._heap, (self._place(number, entry), entry, number))
                continue
            self._push(number, entry)
            if demand is not None and demand.job_id not in self._seen:
                self._seen.add(demand.job_id)
                self._last = number
                if number < self._cold:  # those behind it may share what it gets
                    self._add(self._ledger.waiting.by_model[demand.spec.replica_key][shape_of(demand)], entry)
                return demand
        return None

    def close(self) -> None:
        """Look at no more jobs of the line that the last one came from."""
        self._closed.add(self._last)

    def _add(self, line: Line, after: Entry | None) -> None:
        self._lines.append(line)
        self._push(len(self._lines) - 1, after)

    def _push(self, number: int, after: Entry | None) -> None:
        entry = self._lines[number].after(after)
        while (
            entry and number < self._cold and self._ledger.waiting[entry[1]].spec.replica_key in self._ledger.replicas
        ):
            entry = self._lines[number].after(entry)
        if entry:
            heapq.heappush(self._heap, (self._place(number, entry), entry, number))

    def _place(self, number: int, entry: Entry) -> float:
        if number < self._cold:
            return entry[0]
        replicas = replicas_for(self._ledger.waiting[entry[1]], self._ledger, self._taken)
        if not replicas:
            return entry[0]
        unused = replicas[0].state is WorkerState.IDLE
        return entry[0] - self._bonus if unused else entry[0] + self._bonus

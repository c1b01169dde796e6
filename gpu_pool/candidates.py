"""Waiting jobs that are worth a look, in the order in which they are served, without looking at all of them. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Collection

from gpu_pool.events import Demand
from gpu_pool.ledger import Ledger
from gpu_pool.order import Entry, Line
from gpu_pool.placement import replicas_for
from gpu_pool.records import WorkerState


class Candidates:
    """Merges the lines of all shapes, and those of all models that are loaded, by rank.

    `next` gives one job after another; `close` says that the last one could not be helped, and neither can those behind
    it in its line. A job with a loaded and unused replica of its model goes as if it had waited `bonus` seconds longer.
    """

    def __init__(self, ledger: Ledger, taken: Collection[str], skip: Collection[str], bonus: float) -> None:
        """Replicas on slots in `taken` do not count; jobs in `skip` are left out."""
        self._ledger = ledger
        self._taken = taken
        self._seen = set(skip)
        self._bonus = bonus
        waiting = ledger.waiting
        self._cold = list(waiting.by_shape.values())
        warm = [line for key in ledger.replicas for line in waiting.by_model.get(key, {}).values()]
        self._lines: list[Line] = [*self._cold, *warm]
        self._heap: list[tuple[float, Entry, int]] = []
        """(rank, with the bonus if there is one; rank and job; number of its line), the first of each line."""
        self._closed: set[int] = set()
        self._last = 0
        for number in range(len(self._lines)):
            self._push(number, None)

    def next(self) -> Demand | None:
        """The next job; None when there is none left that could be helped."""
        while self._heap:
            place, entry, number = heapq.heappop(self._heap)
            demand = self._ledger.waiting.get(entry[1])
            if number in self._closed:
                continue
            if demand is not None and place < self._place(number, entry):  # another job took the unused replica
                heapq.heappush(self._heap, (self._place(number, entry), entry, number))
                continue
            self._push(number, entry)
            if demand is not None and demand.job_id not in self._seen:
                self._seen.add(demand.job_id)
                self._last = number
                return demand
        return None

    def close(self) -> None:
        """Look at no more jobs of the line that the last one came from."""
        self._closed.add(self._last)

    def _push(self, number: int, after: Entry | None) -> None:
        if entry := self._lines[number].after(after):
            heapq.heappush(self._heap, (self._place(number, entry), entry, number))

    def _place(self, number: int, entry: Entry) -> float:
        if number < len(self._cold):
            return entry[0]
        replicas = replicas_for(self._ledger.waiting[entry[1]], self._ledger, self._taken)
        unused = bool(replicas) and replicas[0].state is WorkerState.IDLE
        return entry[0] - self._bonus if unused else entry[0]

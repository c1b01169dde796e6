"""The heads: waiting jobs that have to wait for others to end, and that others may pass for a limited time only. Pure.

On each kind of device the first job that has to wait is a head. Once patience with it is over, it is served before all
others, and the first job behind it that asks for something else is a head as well: for what the heads before it leave,
which is all of it where nothing can be done for them yet. So a head that cannot be helped for hours keeps nobody back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import msgspec

from gpu_pool.events import Demand
from gpu_pool.order import WaitingJobs, kind_of, rank


class Head(msgspec.Struct, frozen=True):
    """A job that others may pass until patience with it is over, and since when it is a head."""

    demand: Demand
    since: float

    @property
    def rank(self) -> float:
        return rank(self.demand.order, self.demand.priority)

    def stands_for(self, demand: Demand) -> bool:
        """Whether whatever makes room for the other job would first make room for this one."""
        return kind_of(self.demand) == kind_of(demand) and self.demand.memory_bytes <= demand.memory_bytes


class Heads:
    """By kind of device, the heads by rank: all that one pass of the placer leaves to the next."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._lines: dict[str, list[Head]] = {}

    def __bool__(self) -> bool:
        return bool(self._lines)

    def forget_others(self, waiting: WaitingJobs) -> None:
        """Only jobs that wait are heads."""
        lines = {device: [h for h in line if h.demand.job_id in waiting] for device, line in self._lines.items()}
        self._lines = {device: line for device, line in lines.items() if line}

    def due(self, now: float) -> Iterator[Head]:
        """By kind of device and rank, those with whom patience is over: up to the first with whom it is not."""
        for line in self._lines.values():
            for head in line:
                if not self._is_due(head, now):
                    break
                yield head

    def last(self, device: str, now: float) -> Head | None:
        """The first one that others may still pass, if there is one: no job behind it may be a head yet."""
        return next((head for head in self._lines.get(device, ()) if not self._is_due(head, now)), None)

    def note(self, demand: Demand, now: float) -> None:
        """This job has to wait for others to end: it may be the next head."""
        line = self._lines.setdefault(demand.spec.device, [])
        new = Head(demand, now)
        place = bisect_right(line, new.rank, key=lambda head: head.rank)
        if all(self._is_due(head, now) and not head.stands_for(demand) for head in line[:place]):
            behind = [head for head in line[place:] if not new.stands_for(head.demand)]
            line[place:] = [new, *behind]

    def _is_due(self, head: Head, now: float) -> bool:
        return now - head.since >= self._patience_s

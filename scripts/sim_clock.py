"""A virtual clock, the GPU seconds that pass on it, and the true seconds that decisions take."""

from __future__ import annotations

import heapq
import itertools
from array import array
from collections.abc import Callable
from typing import Any

import msgspec


class Clock:
    """What is to happen, in order of time; what is to happen at the same time, in the order in which it was said."""

    def __init__(self, now: float) -> None:
        self.now = now
        """Seconds; the trace begins at 0."""
        self._agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, act: Callable[..., None], *arguments: Any) -> None:
        """Have `act(*arguments)` called at `when`."""
        heapq.heappush(self._agenda, (when, next(self._numbers), act, arguments))

    def after(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        """Have `act(*arguments)` called so many seconds from now."""
        self.at(self.now + seconds, act, *arguments)

    def next(self) -> tuple[float, Callable[..., None], tuple[Any, ...]]:
        """Take the next entry: when, what, with what. The caller moves `now`."""
        when, _, act, arguments = heapq.heappop(self._agenda)
        return when, act, arguments


class Usage(msgspec.Struct, kw_only=True):
    """GPU seconds: of GPUs that could be used, that computed a chunk, and that loaded a model."""

    usable: float = 0.0
    computing: float = 0.0
    loading: float = 0.0


class Meter:
    """How many GPUs do what now, and what has added up since the trace began."""

    def __init__(self, gpus: int) -> None:
        self.usable = gpus
        self.computing = 0
        self.loading = 0
        self.queued = 0
        """Jobs that wait to be started."""
        self.total = Usage()
        self.while_waiting = Usage()
        """The part of it in which jobs were queued."""

    def add(self, seconds: float) -> None:
        """So much time passes."""
        for usage in (self.total, self.while_waiting) if self.queued else (self.total,):
            usage.usable += seconds * self.usable
            usage.computing += seconds * self.computing
            usage.loading += seconds * self.loading


class Decisions:
    """What each step of the scheduler took, how many jobs were queued then, and whether it had something to decide."""

    def __init__(self) -> None:
        self._queued = array("q")
        self._cpu_ns = array("q")
        self._decides = array("b")

    def note(self, queued: int, cpu_ns: int, *, decides: bool) -> None:
        """One more step."""
        self._queued.append(queued)
        self._cpu_ns.append(cpu_ns)
        self._decides.append(decides)

    @property
    def most_queued(self) -> int:
        """Jobs in the longest queue."""
        return max(self._queued, default=0)

    def seconds(self, at_least_queued: int = 0) -> list[float]:
        """CPU seconds of the steps that decided, with so many jobs queued, ascending."""
        steps = zip(self._queued, self._cpu_ns, self._decides, strict=True)
        return sorted(ns / 1e9 for queued, ns, decides in steps if decides and queued >= at_least_queued)

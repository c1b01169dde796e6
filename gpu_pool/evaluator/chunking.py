"""How much work goes into one chunk: about a second of it, less towards the end, by each worker's own pace."""

from __future__ import annotations

from typing import NamedTuple

FIRST_COST = 512
MIN_COST, MAX_COST = 256, 1 << 20  # fewer tokens than that do not pay for reading the weights
TARGET_SECONDS = 1.0
MAX_GROWTH = 4  # a tiny chunk says little about a large one
LEAST_SHARE = 0.25  # of such a chunk, however near the end is: a smaller one would only cost time between chunks
MIN_PROMPTS = 64  # generation refills its slots from the prompts of a chunk: it takes a few times as many as slots
WORKERS_REMEMBERED = 64


class Work(NamedTuple):
    """Cost of what is left of a job, as one worker looks at it."""

    waiting: float
    held: float
    """By all workers."""
    held_here: float
    """By this one."""
    workers: int

    @property
    def remaining(self) -> float:
        """Each worker's part of what waits."""
        return self.waiting / self.workers

    @property
    def share(self) -> float:
        """What this worker may still take if all are to end together."""
        return (self.waiting + self.held) / self.workers - self.held_here


class Pace:
    """How much work of each kind makes a second on one worker; in the cost of `gpu_pool.evaluator.prefix_line`."""

    def __init__(self) -> None:
        self._budgets: dict[str, float] = {}
        self.chunks = 0
        """Measured so far."""
        self.seconds = 0.0
        """Of the worker's time in them."""

    def budget(self, kind: str, worthwhile: float, work: Work) -> float:
        """Cost of the next chunk of a kind, `worthwhile` at least while there is plenty. 0: this worker has enough.

        With several workers chunks shrink when little waits (guided self-scheduling; Polychronopoulos & Kuck 1987),
        and none is sent ahead that others could begin with, so that all end together. Prompts that are continued
        together take hardly longer than one: of those a worker gets all of its share at once.
        """
        wanted = max(self._budgets.get(kind, FIRST_COST), worthwhile)
        if work.workers == 1:
            return wanted
        if work.held_here and work.share < MIN_COST:
            return 0
        if worthwhile:
            return min(wanted, work.share)
        return min(wanted, max(work.remaining / 2, LEAST_SHARE * wanted, MIN_COST))

    def measured(self, kind: str, cost: int, seconds: float) -> None:
        """A chunk of `cost` took `seconds` of the worker's time."""
        self.chunks += 1
        self.seconds += seconds
        before = self._budgets.get(kind, FIRST_COST)
        wanted = cost / max(seconds, 1e-6) * TARGET_SECONDS
        if wanted < before and seconds < LEAST_SHARE * TARGET_SECONDS:
            return  # what took so little time was small, not slow
        self._budgets[kind] = max(min(wanted, before * MAX_GROWTH, MAX_COST), MIN_COST)


class Paces:
    """The pace of each worker, from job to job: a warm one need not be found out again."""

    def __init__(self) -> None:
        self._paces: dict[str, Pace] = {}

    def of(self, worker_id: str) -> Pace:
        """The worker's, forgotten when many others were asked for since."""
        pace = self._paces[worker_id] = self._paces.pop(worker_id, None) or Pace()
        if len(self._paces) > WORKERS_REMEMBERED:
            del self._paces[next(iter(self._paces))]
        return pace

    def computed(self) -> dict[str, tuple[int, float]]:
        """Chunks that each worker has computed so far, and the seconds of its time in them."""
        return {worker_id: (pace.chunks, pace.seconds) for worker_id, pace in self._paces.items()}


def worthwhile_cost(prompts_cost: float, count: int, batch_size: int | None) -> float:
    """Cost of as many prompts as generation wants in a chunk, where `count` of them cost `prompts_cost`."""
    return max(MIN_PROMPTS, 2 * (batch_size or 0)) * prompts_cost / count

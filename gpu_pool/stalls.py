"""Which workers hang: those that owe answers and have got on with nothing for too long. Pure: time is an argument.

Two sides know half of it each. The worker's computing thread says when it begins a batch or step; evaluators say while
they wait for a worker in silence. A worker that nobody waits for does not hang, and one whose process is stopped before
it has seen any work does.
"""

from __future__ import annotations

FORGET_SECONDS = 15.0
"""Evaluators repeat every 5 s that they wait: when nothing is heard for so long, nobody does any more."""


class Stalls:
    """What both sides have said of each worker, in monotonic seconds."""

    def __init__(self) -> None:
        self._progressed: dict[str, float] = {}
        self._awaited: dict[str, tuple[float, float]] = {}
        """Since when, and when it was last said."""

    def progressed(self, worker_id: str, now: float) -> None:
        """It computes."""
        self._progressed[worker_id] = now

    def awaited(self, worker_id: str, now: float) -> float:
        """An evaluator waits for it; returns for how many seconds now it has got on with nothing, though awaited."""
        since, last = self._awaited.get(worker_id, (now, now))
        if now - last > FORGET_SECONDS:
            since = now
        self._awaited[worker_id] = since, now
        return now - max(since, self._progressed.get(worker_id, since))

    def forget(self, worker_id: str) -> None:
        """It is gone."""
        self._progressed.pop(worker_id, None)
        self._awaited.pop(worker_id, None)

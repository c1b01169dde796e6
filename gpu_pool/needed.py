"""Which workers jobs cannot do without, and so which slots nobody else can have before a job ends. Pure.

A job needs the last worker that it keeps: whatever it has beside, it can give back. On a full box nearly all slots are
needed, and what many jobs ask for in each pass is answered without a look at each of their workers.
"""

from __future__ import annotations

from collections import Counter

from gpu_pool.records import Worker


class Needed:
    """By job the one worker that it keeps, if it keeps just one."""

    def __init__(self) -> None:
        self.workers: Counter[str] = Counter()
        """Worker -> how many jobs need it; none that no job needs."""
        self.slots: Counter[str] = Counter()
        """Slot -> how many jobs need a worker there, in the same way."""
        self._last: dict[str, Worker] = {}

    def note(self, job_id: str, last: Worker | None) -> None:
        """The job keeps this worker and no other; None: it keeps several, or none."""
        before = self._last.pop(job_id, None)
        if last is not None:
            self._last[job_id] = last
        if before is not None and last is not None and before.id == last.id:
            return
        if last is not None:
            self.workers[last.id] += 1
            self.slots.update(last.slots)
        if before is not None:
            _take(self.workers, (before.id,))
            _take(self.slots, before.slots)


def _take(counts: Counter[str], names: tuple[str, ...]) -> None:
    for name in names:
        counts[name] -= 1
        if not counts[name]:
            del counts[name]

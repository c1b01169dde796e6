"""Requests that ended in an error: how many, of which tasks, why, and whether the job may still complete."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gpu_pool.evaluator.scores import members

METRIC = "evalpool_errored"
"""Beside a task's or group's scores: its requests that ended in an error. Not there when there are none."""
MOST_CAUSES = 3
"""Distinct causes in the error of a job."""


class Errored:
    """The count of one job; safe to use from several threads."""

    def __init__(self, max_share: float) -> None:
        """`max_share` of the job's requests may end in an error."""
        self._max_share = max_share
        self._lock = threading.Lock()
        self._by_task: Counter[str] = Counter()
        self._causes: dict[str, Counter[str]] = {}

    def add(self, counts: Mapping[str, int], cause: str) -> None:
        """So many requests of each task ended in an error, because of `cause`."""
        with self._lock:
            self._by_task.update(counts)
            for task, count in counts.items():
                self._causes.setdefault(task, Counter())[cause] += count

    @property
    def by_task(self) -> dict[str, int]:
        """Requests that ended in an error, of each task that has some."""
        with self._lock:
            return {task: count for task, count in self._by_task.items() if count}

    def beside(
        self, metrics: Mapping[str, Mapping[str, Any]], subtasks: Mapping[str, Sequence[str]]
    ) -> dict[str, dict[str, Any]]:
        """The scores of tasks and groups with METRIC; `subtasks` are tasks and groups directly below a group."""
        by_task = self.by_task
        shown: dict[str, dict[str, Any]] = {}
        for name, values in metrics.items():
            errored = sum(by_task.get(task, 0) for task in members(name, subtasks))
            shown[name] = {**values, METRIC: errored} if errored else dict(values)
        return shown

    def too_many(self, total: int, *, is_final: bool) -> str | None:
        """Why the job must fail, if that is certain; `is_final`: it has `total` requests, and not more."""
        with self._lock:
            errored = self._by_task.total()
            certain = is_final or not self._max_share
            if not certain or errored <= self._max_share * total:
                return None
            causes: Counter[str] = sum(self._causes.values(), Counter())
        of = f"{total} requests" if is_final else f"{total} requests so far"
        shown = "; ".join(f"{cause} ({count})" for cause, count in list(causes.items())[:MOST_CAUSES])
        more = f"; and {len(causes) - MOST_CAUSES} other causes" if len(causes) > MOST_CAUSES else ""
        return (
            f"{errored} of {of} ended in an error ({errored / total:.2%}, more than max_error_share "
            f"{self._max_share:g} allows): {shown}{more}"
        )

    def report(self, totals: Mapping[str, int], excluded: Mapping[str, int]) -> dict[str, Any]:
        """What the results file says: of each task's `totals` requests, and its `excluded` documents."""
        with self._lock:
            tasks = {
                task: {
                    "answered": total - self._by_task[task],
                    "errored_excluded": self._by_task[task],
                    "documents_excluded": excluded.get(task, 0),
                    "causes": dict(self._causes.get(task, {})),
                }
                for task, total in totals.items()
            }
            return {"errored": self._by_task.total(), "max_error_share": self._max_share, "tasks": tasks}

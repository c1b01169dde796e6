"""Counts what a job has done and tells the server a few times a second."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from gpu_pool.messages import JobProgress
from gpu_pool.records import EngineRoute, Phase, Progress, TaskProgress

REPORT_INTERVAL_S = 0.25  # what a person sees as live


class ProgressReporter:
    """One job's counters; safe to use from several threads."""

    def __init__(self, job_id: str, send: Callable[[JobProgress], None]) -> None:
        self._job_id = job_id
        self._send = send
        self._lock = threading.Lock()
        self._phase = Phase.PREPARING
        self._done: Counter[str] = Counter()
        self._errored: Counter[str] = Counter()
        self._totals: dict[str, int] = {}
        self._cached = 0
        self._workers: Counter[str] = Counter()
        self._routes: dict[EngineRoute, None] = {}
        """In the order in which they were told."""
        self._waits_for: str | None = None
        self._reported: Progress | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressReporter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No report follows."""
        self._ended.set()
        self._thread.join()

    @property
    def current(self) -> Progress:
        """The counters now."""
        with self._lock:
            tasks = {
                name: TaskProgress(done=self._done[name], total=total, errored=self._errored[name])
                for name, total in self._totals.items()
            }
            return Progress(
                phase=self._phase,
                tasks=tasks,
                cached=self._cached,
                workers=dict(self._workers),
                routes=tuple(self._routes),
                waits_for=self._waits_for,
            )

    def enter(self, phase: Phase) -> None:
        """The job is in this phase from now on."""
        with self._lock:
            self._phase = phase

    def waits_for(self, what: str | None) -> None:
        """The job cannot go on without this, which others have to see to; None: it goes on."""
        with self._lock:
            self._waits_for = what

    def expect(self, tasks: Iterable[str]) -> None:
        """These tasks will be evaluated."""
        with self._lock:
            self._totals = dict.fromkeys(tasks, 0)

    def built(self, task: str, total: int) -> None:
        """The task has so many requests, or so many more."""
        with self._lock:
            self._totals[task] += total

    def routed(self, route: EngineRoute) -> None:
        """This is how a worker computes."""
        with self._lock:
            self._routes[route] = None

    def answered(self, counts: Mapping[str, int], worker_id: str) -> None:
        """A worker answered so many requests of each task."""
        with self._lock:
            self._done.update(counts)
            self._workers[worker_id] += sum(counts.values())

    def errored(self, counts: Mapping[str, int]) -> None:
        """So many requests of each task ended in an error."""
        with self._lock:
            self._done.update(counts)
            self._errored.update(counts)

    def known(self, task: str, *, cached: int, repeated: int) -> None:
        """Requests of the task needed no worker: answered by the cache, or the same as an earlier one of the job."""
        with self._lock:
            self._done[task] += cached + repeated
            self._cached += cached

    def _run(self) -> None:
        while not self._ended.wait(REPORT_INTERVAL_S):
            progress = self.current
            if progress != self._reported:
                self._reported = progress
                self._send(JobProgress(job_id=self._job_id, progress=progress))

"""Waiting for a job: how long until the next look at it, and what to say meanwhile. No I/O but what it prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Json = dict[str, Any]

FIRST_POLL_SECONDS = 0.1  # a small job on a warm model is done in less than a second
LONGEST_POLL_SECONDS = 2.0
POLL_GROWTH = 1.3
FINAL = ("completed", "failed", "cancelled")


class JobFailed(RuntimeError):
    """The job ended by an error. `job` is what GET /jobs/{id} says of it."""

    def __init__(self, job: Json) -> None:
        self.job = job
        super().__init__(f"Job failed: {job.get('error') or 'Unknown error'}")


class Waiting:
    """What waiting for a job does between two looks at it."""

    def __init__(
        self,
        poll_interval: float | None,
        timeout: float | None,
        verbose: bool,
        on_progress: Callable[[Json], object] | None,
    ) -> None:
        """`poll_interval`: seconds between two looks, None: 0.1, then rarer. `timeout`: seconds, None: no limit."""
        self._interval = poll_interval
        self._delay = FIRST_POLL_SECONDS
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._verbose = verbose
        self._on_progress = on_progress
        self._said: str | None = None

    def seconds_after(self, job: Json) -> float | None:
        """How long to wait before the next look, None when `job` has ended; raises JobFailed and TimeoutError."""
        self._say(job)
        if self._on_progress:
            self._on_progress(job)
        if job["status"] == "failed":
            raise JobFailed(job)
        if job["status"] in FINAL:
            return None
        return self._next_delay(job)

    def _next_delay(self, job: Json) -> float:
        delay = self._delay if self._interval is None else self._interval
        self._delay = min(self._delay * POLL_GROWTH, LONGEST_POLL_SECONDS)
        if self._deadline is None:
            return delay
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"Timeout waiting for job {job['job_id']}")
        return min(delay, left)

    def _say(self, job: Json) -> None:
        said = job["status"]
        if said == "queued":
            said += f" (position: {job['position_in_queue']})"
        if self._verbose and said != self._said:
            print(f"Job {job['job_id'][:8]}... {said}")
        self._said = said

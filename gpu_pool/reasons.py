"""Why jobs wait, for people: what the scheduler and their own processes know, and what is done before that."""

from __future__ import annotations

import time

from gpu_pool.explain import explain
from gpu_pool.intake import Intake
from gpu_pool.live_jobs import LiveJobs, waits_for
from gpu_pool.merges import Merges
from gpu_pool.runner import Runner
from gpu_pool.views import WaitingView

MOST_EXPLAINED = 1000
"""Waiting jobs whose reasons are told, as each takes those before it into account: some 20 ms on a box with 8
GPUs, 60 ms with 64, in which nothing else is answered."""
MOST_SHARE = 0.05
"""Of the server's time that may go into reasons of single jobs: many who wait for theirs ask again and again."""


class Reasons:
    """Asked for all that wait, or for one of them."""

    def __init__(self, runner: Runner, jobs: LiveJobs, merges: Merges, intake: Intake) -> None:
        self._runner = runner
        self._jobs = jobs
        self._merges = merges
        self._intake = intake
        self._made: dict[str, WaitingView] = {}
        self._make_again_at = 0.0

    def first(self, limit: int) -> list[WaitingView]:
        """Of running jobs that cannot go on or lost their workers, and of the first `limit` of the queue."""
        ledger = self._runner.scheduler.ledger
        known = (
            (job_id, self._jobs.eta_seconds(job_id, self._runner.ran_seconds(job_id))) for job_id in ledger.running
        )
        left = {job_id: seconds for job_id, seconds in known if seconds is not None}
        explained = {wait.job_id: wait for wait in explain(ledger, left, limit)}
        queued = [job_id for _, job_id in zip(range(limit), self._jobs.queued, strict=False)]
        held_up = {job_id: wait for job_id in self._jobs.active if (wait := self._held_up(job_id))}
        stuck = {job_id: wait for job_id, wait in explained.items() if job_id in ledger.running}
        return [*(stuck | held_up).values(), *(explained.get(job_id) or self._before(job_id) for job_id in queued)]

    def of(self, job_id: str) -> WaitingView | None:
        """Of one job; None when it does not wait."""
        if wait := self._held_up(job_id):
            return wait
        run, position = self._runner.scheduler.ledger.running.get(job_id), self._jobs.queued.position(job_id)
        if position is None and (run is None or run.workers):
            return None
        began = time.monotonic()
        if began >= self._make_again_at:
            self._made = {wait.job_id: wait for wait in self.first(MOST_EXPLAINED)}
            self._make_again_at = time.monotonic() + (time.monotonic() - began) / MOST_SHARE
        if wait := self._made.get(job_id):
            return wait
        ahead = f"{position} jobs are ahead of it." if position else "It is about to be looked at."
        return WaitingView(job_id=job_id, needs="its turn", reason=ahead, starts_in=None)

    def _held_up(self, job_id: str) -> WaitingView | None:
        """Why a job that runs does not go on."""
        job = self._jobs.get(job_id)
        if job is None or (reason := waits_for(job)) is None:
            return None
        return WaitingView(job_id=job_id, needs="room on a disk", reason=reason, starts_in=None)

    def _before(self, job_id: str) -> WaitingView:
        """Why a job waits that the scheduler does not know."""
        return self._merges.waiting(job_id) or self._intake.waiting(job_id)

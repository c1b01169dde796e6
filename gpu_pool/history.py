"""What happened to a job, as the store keeps it: its attempts, and each change. Frozen values."""

from __future__ import annotations

from datetime import datetime

from gpu_pool.records import JobState, Record


class Attempt(Record, frozen=True, kw_only=True):
    """One time that a job's processes were started, as the store keeps it: told first without an end, then with it."""

    number: int
    """From 1."""
    started_at: datetime | None
    ended_at: datetime | None = None
    outcome: str | None = None
    """One word: the job's final state, or "requeued"."""
    cause: str | None = None
    """For people, why it ended so."""


class HistoryEntry(Record, frozen=True, kw_only=True):
    """One thing that happened to a job, as the store keeps it: written with the change itself."""

    at: datetime
    event: str
    """"submitted", "started", "worker_lost", "model_changed", "requeued", or the name of the state that followed."""
    state: JobState
    """The state that followed."""
    attempt: int
    """The attempt that it was about; 0 before the first."""
    cause: str | None = None
    """For people, why."""

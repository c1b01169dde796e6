"""The two state machines, each a table on one screen. Nothing else decides which change of state is allowed."""

from __future__ import annotations

import enum

from gpu_pool.records import JobState, WorkerState


class JobEvent(enum.StrEnum):
    """What happens to a job."""

    START = "start"  # an evaluator and a worker were found
    COMPLETE = "complete"  # the evaluator stored its results
    FAIL = "fail"  # it cannot be completed
    CANCEL = "cancel"  # someone asked
    REQUEUE = "requeue"  # its processes were lost, or the server stopped
    RELEASED = "released"  # everything that worked for it has let go


class WorkerEvent(enum.StrEnum):
    """What happens to a worker."""

    LOADED = "loaded"  # its model is ready
    ATTACH = "attach"  # a first job uses it
    RELEASE = "release"  # its last job let go
    STOP = "stop"  # it is asked to end


JOB_TRANSITIONS: dict[JobState, dict[JobEvent, JobState]] = {
    JobState.QUEUED: {
        JobEvent.START: JobState.RUNNING,
        JobEvent.CANCEL: JobState.CANCELLED,
        JobEvent.FAIL: JobState.FAILED,
    },
    JobState.RUNNING: {
        JobEvent.COMPLETE: JobState.COMPLETED,
        JobEvent.FAIL: JobState.FAILED,
        JobEvent.CANCEL: JobState.CANCELLING,
        JobEvent.REQUEUE: JobState.QUEUED,
    },
    JobState.CANCELLING: {
        JobEvent.RELEASED: JobState.CANCELLED,
    },
    JobState.COMPLETED: {},
    JobState.FAILED: {},
    JobState.CANCELLED: {},
}

WORKER_TRANSITIONS: dict[WorkerState, dict[WorkerEvent, WorkerState]] = {
    WorkerState.STARTING: {
        WorkerEvent.LOADED: WorkerState.IDLE,
        WorkerEvent.STOP: WorkerState.STOPPING,
    },
    WorkerState.IDLE: {
        WorkerEvent.ATTACH: WorkerState.BUSY,
        WorkerEvent.STOP: WorkerState.STOPPING,
    },
    WorkerState.BUSY: {
        WorkerEvent.RELEASE: WorkerState.IDLE,
        WorkerEvent.STOP: WorkerState.STOPPING,
    },
    WorkerState.STOPPING: {},
}


class InvalidTransition(Exception):
    """This change of state is not in the table."""


def advance_job(state: JobState, event: JobEvent) -> JobState:
    """The state after `event`; raises InvalidTransition where the table has none."""
    try:
        return JOB_TRANSITIONS[state][event]
    except KeyError:
        raise InvalidTransition(f"a job that is {state} cannot {event}") from None


def advance_worker(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state after `event`; raises InvalidTransition where the table has none."""
    try:
        return WORKER_TRANSITIONS[state][event]
    except KeyError:
        raise InvalidTransition(f"a worker that is {state} cannot take {event!r}") from None

import pytest

from gpu_pool.records import JobState, WorkerState
from gpu_pool.transitions import (
    JOB_TRANSITIONS,
    WORKER_TRANSITIONS,
    InvalidTransition,
    JobEvent,
    WorkerEvent,
    advance_job,
    advance_worker,
)


def test_every_state_is_in_its_table() -> None:
    assert set(JOB_TRANSITIONS) == set(JobState)
    assert set(WORKER_TRANSITIONS) == set(WorkerState)


def test_final_states_have_no_way_out() -> None:
    assert all(not JOB_TRANSITIONS[state] for state in JobState if state.is_final)
    assert not WORKER_TRANSITIONS[WorkerState.STOPPING]


def test_every_other_job_state_can_reach_an_end() -> None:
    for state in JobState:
        reached, frontier = {state}, {state}
        while frontier:
            frontier = {after for before in frontier for after in JOB_TRANSITIONS[before].values()} - reached
            reached |= frontier
        assert any(found.is_final for found in reached), state


def test_what_is_not_in_the_table_raises() -> None:
    assert advance_job(JobState.QUEUED, JobEvent.START) is JobState.RUNNING
    with pytest.raises(InvalidTransition, match="completed cannot cancel"):
        advance_job(JobState.COMPLETED, JobEvent.CANCEL)
    assert advance_worker(WorkerState.IDLE, WorkerEvent.ATTACH) is WorkerState.BUSY
    with pytest.raises(InvalidTransition, match="stopping"):
        advance_worker(WorkerState.STOPPING, WorkerEvent.STOP)

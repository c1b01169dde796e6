"""Nobody starves: beside a stream of small jobs that keeps the box full, every other job starts and ends in time.

The scheduler runs random jobs in the simulated box, sets of GPUs and certain GPUs among them, while GPUs are lost
and come back, and while a more important job keeps some for ever: those who need these wait, and keep nobody back.
"""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sim_computing import JobRecord
from sim_traces import TraceJob, TraceModel, make_trace
from sim_world import Fault, World

from gpu_pool.scheduler import Scheduler

GPUS = 4
EVALUATORS = 8
PATIENCE_S = 20.0
LOAD_S = 4.0
CHANGE_S = 5.0
"""More than it takes to end a chunk and a worker and to have its memory back."""
LONGEST_S = 40
"""Most seconds that a job of the random ones computes on one replica."""
LONGEST_SMALL_S = 16
LATEST_S = 200.0
"""When the last of the random ones comes."""

MODELS = {gpus: TraceModel(name=f"on {gpus}", load_s=LOAD_S, gpus=gpus) for gpus in range(1, GPUS + 1)}
ENDLESS_MODELS = [TraceModel(name=f"endless on {gpus}", load_s=LOAD_S, gpus=gpus) for gpus in (1, 2)]
SMALL_MODELS = [TraceModel(name=f"small {number}", load_s=LOAD_S) for number in range(GPUS + 1)]


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """More small jobs than the box can do, or as many; on few models their replicas never become unused."""

    between_s: float
    chunks: int
    num_gpus: int
    models: int

    def jobs(self, seconds: float) -> list[TraceJob]:
        """Small jobs go on coming for so long."""
        return [
            TraceJob(
                id=f"small-{number}",
                arrival_s=number * self.between_s,
                model=SMALL_MODELS[number % self.models].name,
                chunks=self.chunks,
                chunk_s=1.0,
                num_gpus=self.num_gpus,
            )
            for number in range(int(seconds / self.between_s))
        ]

    def backlog_s(self, gpus: int) -> float:
        """How much longer than LATEST_S those take, on so many GPUs, that come before the last of the random ones."""
        return max(0.0, LATEST_S / self.between_s * (self.chunks + CHANGE_S) / gpus - LATEST_S)


def other_job(
    number: int, arrival_s: float, gpus: int, chunks: int, replicas: int, priority: int = 0, gpu: int | None = None
) -> TraceJob:
    pinned = gpus == 1 and gpu is not None
    return TraceJob(
        id=f"other-{number}",
        arrival_s=arrival_s,
        model=MODELS[gpus].name,
        chunks=chunks,
        chunk_s=1.0,
        num_gpus=1 if pinned else min(GPUS, gpus * replicas),
        priority=priority,
        gpu=gpu if pinned else None,
    )


def endless_job(gpus: int, seconds: float) -> TraceJob:
    """It has the first GPUs for so long, and pauses for nobody."""
    usual = {"id": "endless", "arrival_s": 0.0, "chunk_s": 1.0, "priority": 10}
    return TraceJob(**usual, model=f"endless on {gpus}", chunks=int(seconds), num_gpus=gpus)


STREAMS = st.builds(
    Stream,
    between_s=st.sampled_from([2.0, 4.0]),
    chunks=st.sampled_from([8, LONGEST_SMALL_S]),
    num_gpus=st.sampled_from([1, 2]),
    models=st.integers(1, GPUS + 1),
)
OTHERS = st.lists(
    st.builds(
        other_job,
        st.integers(0, 10**9),
        arrival_s=st.floats(0, LATEST_S),
        gpus=st.integers(1, GPUS),
        chunks=st.integers(1, LONGEST_S),
        replicas=st.integers(1, GPUS),
        priority=st.sampled_from([0, 0, 1, 8]),
        gpu=st.sampled_from([None, None, 0, GPUS - 1]),
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda job: job.id,
)
FAULTS = st.lists(
    st.builds(Fault, at_s=st.floats(0, 300), gpu=st.integers(0, GPUS - 1), lost_s=st.sampled_from([0.0, 30.0, 60.0])),
    max_size=4,
)


def run(jobs: list[TraceJob], faults: list[Fault], patience_s: float = PATIENCE_S) -> list[JobRecord]:
    trace = make_trace("no starvation", [*MODELS.values(), *SMALL_MODELS, *ENDLESS_MODELS], jobs)
    scheduler = Scheduler(evaluators=EVALUATORS, max_attempts=100, patience_s=patience_s)
    world = World(trace, GPUS, scheduler, faults=tuple(faults))
    world.run(until_s=1e6)
    return list(world.jobs.values())


def bound_s(small: Stream, others: list[TraceJob], faults: list[Fault], gpus: int = GPUS) -> float:
    """What one of the random jobs may have to wait for: each of them, one after the other.

    Each becomes the first in line once, is passed while patience lasts, finds jobs on its GPUs that may not pause yet,
    loads, and computes; before all that the small jobs that came first are done, and those that run must end, with all
    evaluators on one replica. GPUs that are lost stop all of it.
    """
    each = 2 * PATIENCE_S + LOAD_S + LONGEST_S + CHANGE_S
    lost = sum(fault.lost_s + LOAD_S + CHANGE_S for fault in faults)
    return len(others) * each + small.backlog_s(gpus) + EVALUATORS * LONGEST_SMALL_S + lost


def check(small: Stream, others: list[TraceJob], faults: list[Fault], endless_gpus: int = 0) -> None:
    """All jobs end, in time but for those that need what the endless job has; nobody is passed for ever."""
    bound = bound_s(small, others, faults, GPUS - endless_gpus)
    until_s = LATEST_S + bound + 100  # small jobs come for so much longer than anyone may have to wait
    endless = [endless_job(endless_gpus, until_s)] if endless_gpus else []
    records = run([*endless, *small.jobs(until_s), *others], faults)
    assert {record.outcome for record in records} == {"completed"}
    helped = [record for record in records if not needs_what_is_taken(record.trace, endless_gpus)]
    for record in helped:
        assert record.started_s is not None
        assert record.ended_s is not None
        if record.trace.id.startswith("other"):
            assert record.started_s <= record.trace.arrival_s + bound
            assert record.ended_s <= record.trace.arrival_s + 2 * bound
    assert not passed(helped, bound)


def needs_what_is_taken(job: TraceJob, gpus: int) -> bool:
    """Whether it cannot be had beside an endless job on the first `gpus` GPUs."""
    of_a_replica = int(job.model.removeprefix("on ")) if job.id.startswith("other") else 1
    return job.id == "endless" or of_a_replica > GPUS - gpus or (job.gpu is not None and job.gpu < gpus)


@settings(max_examples=15, derandomize=True, phases=[Phase.generate])  # shrinking takes minutes
@given(small=STREAMS, others=OTHERS, faults=FAULTS)
def test_every_job_starts_and_ends_within_a_bound(small: Stream, others: list[TraceJob], faults: list[Fault]) -> None:
    check(small, others, faults)


@settings(max_examples=10, derandomize=True, phases=[Phase.generate])
@given(small=STREAMS, others=OTHERS, gpus=st.integers(1, 2))
def test_nobody_is_kept_back_by_those_who_need_what_they_cannot_get(
    small: Stream, others: list[TraceJob], gpus: int
) -> None:
    check(small, others, [], gpus)


@pytest.mark.exhaustive
@settings(max_examples=500, phases=[Phase.generate])
@given(small=STREAMS, others=OTHERS, faults=FAULTS, gpus=st.integers(0, 2))
def test_more_of_them_that_are_others_each_time(
    small: Stream, others: list[TraceJob], faults: list[Fault], gpus: int
) -> None:
    check(small, others, [] if gpus else faults, gpus)


def passed(records: list[JobRecord], by_s: float) -> list[str]:
    """Jobs that started after others no more important than they are, which came so much later."""
    starts = [(record.trace.arrival_s, record.trace.priority, record.started_s or math.inf) for record in records]
    return [
        record.trace.id
        for record in records
        if any(
            arrival_s > record.trace.arrival_s + by_s
            and priority <= record.trace.priority
            and start_s < record.started_s
            for arrival_s, priority, start_s in starts
        )
    ]


def test_without_patience_a_set_would_wait_until_no_small_job_comes() -> None:
    small, large = Stream(between_s=2.0, chunks=8, num_gpus=1, models=4), other_job(0, 100.0, 4, 10, 1)
    bound = bound_s(small, [large], [])
    jobs = [*small.jobs(2 * bound), large]
    (patient,) = [record for record in run(jobs, []) if record.trace.id == large.id]
    (endless,) = [record for record in run(jobs, [], patience_s=1e9) if record.trace.id == large.id]
    assert (patient.started_s or 0) < large.arrival_s + bound < 2 * bound < (endless.started_s or 0)

"""The lines of waiting jobs, beside the plain list that they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scheduler_box import spec

from gpu_pool.events import Demand
from gpu_pool.order import Kind, Shape, WaitingJobs, rank, shape_of

DEMANDS = st.builds(
    lambda number, model, gpus, memory, order, priority: Demand(
        job_id=f"job-{number}",
        spec=spec(model, "cuda"),
        max_replicas=1,
        gpus=gpus,
        memory_bytes=memory,
        order=order,
        priority=priority,
    ),
    st.integers(0, 9),
    st.sampled_from("abc"),
    st.integers(1, 2),
    st.sampled_from([0, 5, 6]),
    st.integers(0, 5).map(float),
    st.integers(-1, 1),
)


@given(steps=st.lists(st.one_of(DEMANDS, st.integers(0, 9)), max_size=40))
def test_lines_hold_the_waiting_jobs_by_rank_and_the_first_of_each_model(steps: list[Demand | int]) -> None:
    waiting, expected = WaitingJobs(), dict[str, Demand]()
    for step in steps:
        if isinstance(step, Demand):
            waiting.add(step)
            expected[step.job_id] = step
        else:
            assert waiting.pop(f"job-{step}") == expected.pop(f"job-{step}", None)
    in_line = sorted(expected.values(), key=lambda demand: (rank(demand.order, demand.priority), demand.job_id))
    assert list(waiting.values()) == in_line
    firsts: dict[tuple[Shape, str], str] = {}
    for demand in in_line:
        firsts.setdefault((shape_of(demand), demand.spec.replica_key), demand.job_id)
    kinds: dict[Kind, list[str]] = {}
    for ((kind, _), _), job_id in firsts.items():
        kinds.setdefault(kind, []).append(job_id)
    assert {kind: list(line) for kind, line in waiting.firsts.items()} == kinds
    for kind, job_ids in kinds.items():
        assert waiting.least_memory(kind) == min(expected[job_id].memory_bytes for job_id in job_ids)
    assert {key: {shape for shape in lines} for key, lines in waiting.by_model.items()} == {
        key: {shape for shape, its_key in firsts if its_key == key} for _, key in firsts
    }

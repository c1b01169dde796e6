"""Judgements on a GPU's state, from plain values."""

from __future__ import annotations

import pytest

from gpu_pool.gpu_usage import GIB, Lease, could_be, room_bytes, why_busy, why_no_room, why_not_back
from gpu_pool.hardware import Gpu


def gpu(**changes: object) -> Gpu:
    values = {"uuid": "GPU-x", "index": "0", "name": "x", "total_bytes": 80 * GIB, "free_bytes": 79 * GIB}
    return Gpu(**(values | {"visible_device": "0"} | changes))


def lease(name: str = "worker-1", *pids: int, budget: int = 0, before: int = GIB, loaded: int = 0) -> Lease:
    return Lease(
        worker_id=name, memory_bytes=budget, unexplained_before=before, pids=set(pids), loaded_bytes=loaded, leader=1
    )


def test_a_gpu_without_strangers_and_with_enough_memory_is_free() -> None:
    assert why_busy(gpu(processes=((1, GIB), (2, 0))), (), 0.9) is None
    assert why_busy(gpu(free_bytes=72 * GIB), (), 0.9) is None


def test_a_busy_gpu_says_who_and_how_much() -> None:
    assert why_busy(gpu(), ((7, 3 * GIB), (8, 0)), 0.9) == "Other processes use it: 7 (3.0 GiB), 8 (0.0 GiB)."
    full = gpu(free_bytes=10 * GIB)
    assert why_busy(full, (), 0.9) == "Only 10.0 of 80.0 GiB are free; 90% must be."
    assert why_busy(gpu(problem="It is lost."), ((1, 1),), 0.9) == "It is lost."


def test_one_worker_has_a_gpu_to_itself() -> None:
    assert why_no_room(gpu(), [], 0) is None
    assert why_no_room(gpu(), [lease()], 0) == "It is held by worker-1."
    assert why_no_room(gpu(), [lease()], GIB) == "It is held by worker-1."
    assert "no memory budget" in (why_no_room(gpu(), [lease(budget=GIB)], 0) or "")


def test_room_is_what_is_free_or_will_be_when_others_are_gone() -> None:
    assert room_bytes(gpu(), [], 0.9) == 79 * GIB
    assert room_bytes(gpu(free_bytes=2 * GIB), [], 0.9) == 72 * GIB


def test_budgets_share_what_was_free_before_whether_they_are_used_or_not() -> None:
    others = [lease("a", 5, budget=30 * GIB), lease("b", budget=20 * GIB, before=31 * GIB)]
    assert room_bytes(gpu(), others, 0.9) == 79 * GIB
    assert why_no_room(gpu(), others, 29 * GIB) is None
    refused = "30.0 GiB are needed; 29.0 of 80.0 GiB are neither used nor promised."
    assert why_no_room(gpu(), others, 30 * GIB) == refused
    assert why_no_room(gpu(free_bytes=49 * GIB, processes=((5, 30 * GIB),)), others, 30 * GIB) == refused
    assert why_no_room(gpu(free_bytes=9 * GIB), others, 10 * GIB)  # somebody has taken more than was promised
    assert why_no_room(gpu(free_bytes=9 * GIB), [], 10 * GIB)


def test_memory_is_back_when_no_process_is_left_and_the_rest_is_as_before() -> None:
    ended = lease("worker-1", 5, 6)
    assert why_not_back(gpu(), ended, [], ()) is None
    left = why_not_back(gpu(processes=((5, 0),)), ended, [], ())
    assert left == "processes of worker-1 are still on it: 5 (0.0 GiB)"
    grown = why_not_back(gpu(free_bytes=70 * GIB), ended, [], ())
    assert grown == "9.0 GiB more are in use than before worker-1, by no process that is listed"


def test_a_neighbour_s_growth_is_not_the_dead_worker_s() -> None:
    ended, neighbour = lease("worker-1", 5, budget=30 * GIB), lease("worker-2", 9, budget=30 * GIB, before=31 * GIB)
    listed = gpu(free_bytes=50 * GIB, processes=((9, 29 * GIB),))
    assert why_not_back(listed, ended, [neighbour], ()) is None
    leaked = gpu(free_bytes=40 * GIB, processes=((9, 29 * GIB),))
    assert "10.0 GiB more" in (why_not_back(leaked, ended, [neighbour], ()) or "")


@pytest.mark.parametrize("listed", [(), ((9, 0),)])
def test_a_neighbour_whose_memory_is_hidden_may_have_its_budget(listed: tuple[tuple[int, int], ...]) -> None:
    ended, neighbour = lease("worker-1", 5, budget=30 * GIB), lease("worker-2", 9, budget=20 * GIB)
    assert why_not_back(gpu(free_bytes=59 * GIB, processes=listed), ended, [neighbour], ()) is None
    assert why_not_back(gpu(free_bytes=50 * GIB, processes=listed), ended, [neighbour], ())


def test_what_a_stranger_uses_is_not_the_dead_worker_s() -> None:
    ended = lease("worker-1", 5)
    measured = gpu(free_bytes=40 * GIB, processes=((77, 39 * GIB),))
    assert why_not_back(measured, ended, [], ((77, 39 * GIB),)) is None
    hidden = gpu(free_bytes=40 * GIB, processes=((77, 0),))
    assert why_not_back(hidden, ended, [], ((77, 0),)) is None


def test_one_unknown_process_as_large_as_the_model_may_be_the_worker() -> None:
    assert could_be(lease(), GIB, gpu())
    assert could_be(lease(loaded=2 * GIB), 3 * GIB, gpu())
    assert could_be(lease(loaded=2 * GIB), 0, gpu())
    assert not could_be(lease(loaded=2 * GIB), GIB, gpu())
    assert not could_be(lease("worker-1", 5), GIB, gpu(processes=((5, GIB), (77, GIB))))
    ended = lease()
    ended.ended = True
    assert not could_be(ended, GIB, gpu())

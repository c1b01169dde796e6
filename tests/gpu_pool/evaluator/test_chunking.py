from __future__ import annotations

import pytest

from gpu_pool.evaluator.chunking import (
    FIRST_COST,
    LEAST_SHARE,
    MAX_COST,
    MAX_GROWTH,
    MIN_COST,
    MIN_PROMPTS,
    WORKERS_REMEMBERED,
    Pace,
    Paces,
    Work,
    worthwhile_cost,
)

KIND = "loglikelihood"
PLENTY = 1e9


def scoring(pace: Pace, waiting: float = PLENTY, workers: int = 2) -> float:
    return pace.budget(KIND, 0, Work(waiting, held=0, held_here=0, workers=workers))


def test_pace_follows_the_worker() -> None:
    pace = Pace()
    assert scoring(pace) == FIRST_COST
    pace.measured(KIND, 3000, 1.5)
    assert scoring(pace) == 2000
    pace.measured(KIND, 2000, 1e-3)
    assert scoring(pace) == 2000 * MAX_GROWTH


def test_a_small_chunk_does_not_make_a_worker_slow() -> None:
    pace = Pace()
    pace.measured(KIND, 2000, 1.0)
    pace.measured(KIND, 10, 0.05)
    assert scoring(pace) == 2000


def test_pace_is_bounded() -> None:
    pace = Pace()
    pace.measured(KIND, 100, 1000.0)
    assert scoring(pace) == MIN_COST
    for _ in range(20):
        pace.measured(KIND, 10**9, 1e-3)
    assert scoring(pace) == MAX_COST


@pytest.mark.parametrize(("batch_size", "prompts"), [(None, MIN_PROMPTS), (8, MIN_PROMPTS), (100, 200)])
def test_generation_fills_the_slots_however_slow_it_is(batch_size: int | None, prompts: int) -> None:
    pace = Pace()
    pace.measured("generation", 1000, 100.0)
    worthwhile = worthwhile_cost(30_000, 30, batch_size)
    assert pace.budget("generation", worthwhile, Work(PLENTY, 0, 0, 2)) == prompts * 1000


def test_prompts_that_are_few_are_shared_out_at_once() -> None:
    pace = Pace()
    assert pace.budget("generation", 64_000, Work(waiting=40_000, held=0, held_here=0, workers=2)) == 20_000
    assert pace.budget("generation", 64_000, Work(waiting=8_000, held=32_000, held_here=16_000, workers=2)) == 4_000


def test_nothing_is_sent_ahead_that_others_could_begin_with() -> None:
    pace = Pace()
    assert pace.budget(KIND, 0, Work(waiting=1000, held=1000, held_here=1000, workers=2)) == 0
    assert pace.budget(KIND, 0, Work(waiting=1000, held=1000, held_here=0, workers=2)) > 0
    assert pace.budget(KIND, 0, Work(waiting=1000, held=2000, held_here=1000, workers=2)) > 0
    assert pace.budget(KIND, 0, Work(waiting=1000, held=1000, held_here=1000, workers=1)) > 0
    assert pace.budget(KIND, 0, Work(waiting=1, held=0, held_here=0, workers=2)) > 0


def test_paces_are_remembered_for_the_workers_used_last() -> None:
    paces = Paces()
    first = paces.of("0")
    first.measured(KIND, 3000, 1.5)
    for worker in range(1, WORKERS_REMEMBERED):
        paces.of(str(worker))
    assert paces.of("0") is first
    paces.of("another")
    assert paces.of("0") is first
    for worker in range(WORKERS_REMEMBERED):
        paces.of(f"new {worker}")
    assert paces.of("0") is not first


def test_what_workers_have_computed_is_counted() -> None:
    paces = Paces()
    paces.of("a").measured(KIND, 1000, 1.5)
    paces.of("a").measured(KIND, 10, 0.25)  # too small to say anything about the pace
    paces.of("b").measured(KIND, 1000, 2.0)
    assert paces.computed() == {"a": (2, 1.75), "b": (1, 2.0)}


def test_chunks_shrink_towards_the_end_of_what_several_workers_share() -> None:
    pace = Pace()
    assert [scoring(pace, waiting) for waiting in (4000, 1600, 10)] == [512, 400, MIN_COST]
    pace.measured(KIND, 2000, 1.0)
    assert [scoring(pace, waiting) for waiting in (8000, 4000, 10)] == [2000, 1000, 2000 * LEAST_SHARE]
    assert scoring(pace, waiting=10, workers=1) == 2000

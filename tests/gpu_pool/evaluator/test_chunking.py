from __future__ import annotations

import pytest

from gpu_pool.evaluator.chunking import FIRST_COST, MAX_COST, MAX_GROWTH, MIN_COST, MIN_PROMPTS, Pace, UnitQueue
from gpu_pool.evaluator.requests import Unit
from gpu_pool.messages import GenerationOptions

SCORING = Unit(prompt=(1,) * 9, continuation=(2,))
GENERATING = Unit(prompt=(1,) * 10, options=GenerationOptions(max_gen_toks=990), kind="generation")


def test_pace_follows_the_worker() -> None:
    pace = Pace(None)
    assert pace.budget(SCORING) == FIRST_COST
    pace.measured(SCORING.kind, 3000, 1.5)
    assert pace.budget(SCORING) == 2000
    pace.measured(SCORING.kind, 2000, 1e-3)
    assert pace.budget(SCORING) == 2000 * MAX_GROWTH


def test_pace_is_bounded() -> None:
    pace = Pace(None)
    for _ in range(20):
        pace.measured(SCORING.kind, 100, 1000.0)
    assert pace.budget(SCORING) == MIN_COST
    for _ in range(20):
        pace.measured(SCORING.kind, 10**9, 1e-3)
    assert pace.budget(SCORING) == MAX_COST


@pytest.mark.parametrize(("batch_size", "prompts"), [(None, MIN_PROMPTS), (64, 64)])
def test_generation_fills_a_batch_however_slow_it_is(batch_size: int | None, prompts: int) -> None:
    pace = Pace(batch_size)
    pace.measured(GENERATING.kind, 1000, 100.0)
    assert pace.budget(GENERATING) == prompts * 1000


def test_continuations_of_one_prompt_stay_together() -> None:
    queue = UnitQueue()
    units = [Unit(prompt=(i // 4,) * 9, continuation=(i,)) for i in range(12)]
    queue.add(units)
    assert queue.cut(35.0) == units[:4]
    assert queue.cut(41.0) == units[4:8]
    assert (queue.cost, len(queue)) == (40, 4)
    queue.put_back(units[4:8])
    assert queue.cut(1e9) == units[4:]
    assert queue.cost == 0

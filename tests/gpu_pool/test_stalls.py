"""Which workers hang: what both sides say, against a clock that is only a number."""

from __future__ import annotations

from gpu_pool.stalls import FORGET_SECONDS, Stalls

REPEAT = 5.0
"""Evaluators say so often that they wait."""


def wait(stalls: Stalls, since: float, until: float) -> float:
    """An evaluator waits for "w" all the time; for how long nothing has happened at the end."""
    stalled, now = 0.0, since
    while now <= until:
        stalled = stalls.awaited("w", now)
        now += REPEAT
    return stalled


def test_a_worker_that_never_said_anything_stalls_from_the_first_wait_on() -> None:
    stalls = Stalls()
    assert stalls.awaited("w", 100.0) == 0.0
    assert wait(stalls, 105.0, 160.0) == 60.0


def test_progress_is_what_counts() -> None:
    stalls = Stalls()
    wait(stalls, 100.0, 150.0)
    stalls.progressed("w", 152.0)
    assert stalls.awaited("w", 155.0) == 3.0
    assert wait(stalls, 160.0, 200.0) == 48.0


def test_progress_before_anybody_waited_does_not_count_against_it() -> None:
    stalls = Stalls()
    stalls.progressed("w", 10.0)
    assert stalls.awaited("w", 5000.0) == 0.0, "idle for hours is not stalled for hours"


def test_who_no_longer_waits_is_forgotten() -> None:
    stalls = Stalls()
    wait(stalls, 100.0, 150.0)
    later = 150.0 + FORGET_SECONDS + 0.1
    assert stalls.awaited("w", later) == 0.0
    assert wait(stalls, later + REPEAT, later + 4 * REPEAT) == 20.0


def test_a_repeat_that_is_a_little_late_still_counts() -> None:
    stalls = Stalls()
    stalls.awaited("w", 100.0)
    assert stalls.awaited("w", 100.0 + FORGET_SECONDS) == FORGET_SECONDS


def test_several_evaluators_wait_for_one_worker() -> None:
    stalls = Stalls()
    stalls.awaited("w", 100.0)  # the first one is answered, the second comes to wait meanwhile
    stalls.awaited("w", 103.0)
    assert stalls.awaited("w", 108.0) == 8.0


def test_workers_have_nothing_to_do_with_each_other() -> None:
    stalls = Stalls()
    wait(stalls, 100.0, 130.0)
    assert stalls.awaited("other", 130.0) == 0.0
    stalls.progressed("other", 131.0)
    assert stalls.awaited("w", 135.0) == 35.0


def test_a_worker_that_is_gone_leaves_nothing_behind() -> None:
    stalls = Stalls()
    wait(stalls, 100.0, 150.0)
    stalls.progressed("w", 151.0)
    stalls.forget("w")
    stalls.forget("never seen")
    assert stalls.awaited("w", 155.0) == 0.0

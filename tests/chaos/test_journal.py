"""SIGKILL to every kind of process, before and after every durable write of a job, and in the middle of a bootstrap.

The writes are not a list kept by hand: they are what an undisturbed job passes (`kill_points.py`). After each kill the
job must complete, once, with the bits of the undisturbed run, and leave no other file or process behind; one that is
being cancelled must end as cancelled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest
from chaos_box import Box, NotPassed
from conftest import OpenBox
from kill_points import Plan, Point
from outcomes import Outcome

ATTEMPTS = 5
SIDES = ("before", "after")
VICTIMS = ("server", "desk", "evaluator", "worker")
FEW = {
    "server": ("after insert jobs", "after answers", "in the bootstrap", "before update jobs to completed"),
    "desk": ("after insert jobs",),
    "evaluator": ("in the bootstrap", "after results.json", "before end of all claims"),
    "worker": ("after update jobs to running", "after answers"),
}
"""Steps of the default run, by their beginnings: the first passage of each."""


@pytest.fixture(scope="module")
def box(open_box: OpenBox) -> Box:
    """One worker."""
    return open_box()


@pytest.fixture(scope="module")
def quiet(box: Box) -> tuple[Outcome, list[Point]]:
    """What the undisturbed job leaves, and all that it passed."""
    left = box.run()
    return left, box.control.passages()


def test_the_journal(quiet: tuple[Outcome, list[Point]]):
    """What is to be durable passes, in its order, and each write has a step before and one after it."""
    steps = [point.step for point in quiet[1]]
    order = ["after insert jobs", "after update jobs to running, ", "before answers", "after results.json"]
    order.append("after update jobs to completed, ")
    found = [next(place for place, step in enumerate(steps) if step.startswith(wanted)) for wanted in order]
    assert found == sorted(found)
    for side, other in (("before", "after"), ("after", "before")):
        writes = [step.removeprefix(side) for step in steps if step.startswith(side)]
        assert sorted(writes) == sorted(step.removeprefix(other) for step in steps if step.startswith(other))
    for task in ("chaos_choice", "chaos_words", "chaos_story"):
        assert f"after samples_{task}.jsonl" in steps


@pytest.mark.slow
@pytest.mark.parametrize("victim", VICTIMS)
def test_kills_at_a_few_steps(victim: str, box: Box, quiet: tuple[Outcome, list[Point]], subtests: pytest.Subtests):
    left, passed = quiet
    points = [next(point for point in passed if point.step.startswith(step)) for step in FEW[victim]]
    kill_at(points, victim, box, left, subtests)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", VICTIMS)
def test_kills_at_every_step(victim: str, box: Box, quiet: tuple[Outcome, list[Point]], subtests: pytest.Subtests):
    left, passed = quiet
    kill_at(passed, victim, box, left, subtests)


@pytest.fixture(scope="module")
def cancellation(box: Box) -> list[Point]:
    """What the server writes of a job that is cancelled while it computes."""
    return [point for point in box.cancel() if point.process == "server" and "cancel" in point.step]


@pytest.mark.slow
def test_the_journal_of_a_cancellation(cancellation: list[Point]):
    steps = [point.step.partition(",")[0] for point in cancellation]
    assert steps == [f"{side} update jobs to {state}" for state in ("cancelling", "cancelled") for side in SIDES]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["server", "worker"])
def test_kills_in_the_middle_of_a_cancellation(victim: str, box: Box, cancellation: list[Point]):
    box.cancel(Plan(cancellation[1], victim))


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", VICTIMS)
def test_kills_at_every_step_of_a_cancellation(
    victim: str, box: Box, cancellation: list[Point], subtests: pytest.Subtests
):
    """Its evaluator is gone when the last step is reached."""
    for point in cancellation[: 2 if victim == "evaluator" else None]:
        with subtests.test(f"the {victim} dies {point}"):
            box.cancel(Plan(point, victim))


def kill_at(points: Sequence[Point], victim: str, box: Box, left: Outcome, subtests: pytest.Subtests) -> None:
    for point in points:
        with subtests.test(f"the {victim} dies {point}"):
            assert kill(box, Plan(point, victim)) == left


def kill(box: Box, plan: Plan) -> Outcome:
    """What a run leaves in which the plan was carried out: not every one passes a step for a third time."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(NotPassed):
            return box.run(plan)
    return box.run(plan)

"""SIGKILL while a server starts on a new data folder, before and after everything that it makes durable there."""

from __future__ import annotations

import json

import pytest
from chaos_box import Box
from conftest import OpenBox
from kill_points import Plan, Point
from outcomes import Outcome, outcome


def first_job(box: Box, plan: Plan | None) -> Outcome:
    """What the first job leaves on a new data folder, where the plan is carried out before it.

    Its tasks lie in a folder of this box, which their configurations name.
    """
    box.control.arm(plan)
    left = outcome(box.completed(box.submit()))
    assert plan is None or box.control.has_fired(), "the step was not passed"
    anywhere = json.dumps(left.results).replace(str(box.control.folder.parent), "…")
    return left._replace(results=json.loads(anywhere))


@pytest.fixture(scope="module")
def quiet(open_box: OpenBox) -> tuple[Outcome, list[Point]]:
    """What the first job leaves, and what was passed until it was submitted."""
    box = open_box()
    left = first_job(box, None)
    passed = box.control.passages()
    start = passed[: next(place for place, point in enumerate(passed) if point.step.startswith("before insert jobs"))]
    server = {point.step for point in start if point.process == "server"}
    assert {"before migrate", "after migrate"} <= server
    assert {"before tasks-….msgpack", "after tasks-….msgpack"} <= {
        point.step for point in start if point.process == "desk"
    }
    return left, start


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["server", "desk"])
def test_kills_at_every_step_of_a_start(
    victim: str, open_box: OpenBox, quiet: tuple[Outcome, list[Point]], subtests: pytest.Subtests
):
    left, start = quiet
    for point in start:
        if victim in ("server", point.process):  # the desk lives at its own steps
            with subtests.test(f"the {victim} dies {point}"), open_box() as box:
                assert first_job(box, Plan(point, victim)) == left

"""SIGKILL and SIGSTOP where a job has company: two workers share it, or its worker's model is sharded over two."""

from __future__ import annotations

import signal
from collections.abc import Sequence

import pytest
from chaos_box import Box
from conftest import OpenBox
from kill_points import Plan, Point
from outcomes import Outcome

Quiet = tuple[Outcome, list[Point]]
SHARED = {"num_gpus": 2, "limit": 40}
STALL_SECONDS = 5.0
"""Steps take milliseconds; ranks that a loaded machine keeps waiting must not be taken for stuck ones."""


@pytest.fixture(scope="module")
def two(open_box: OpenBox) -> Box:
    """Two workers."""
    return open_box(workers=2)


@pytest.fixture(scope="module")
def quiet_two(two: Box) -> Quiet:
    left = two.run(**SHARED)
    return left, two.control.passages()


@pytest.fixture(scope="module")
def ranks(open_box: OpenBox) -> Box:
    """One worker of two ranks, joined by gloo; when one of them stops, it is killed soon."""
    return open_box(ranks=2, settings=f"worker_stall_s = {STALL_SECONDS}\n")


@pytest.fixture(scope="module")
def quiet_ranks(ranks: Box) -> Quiet:
    left = ranks.run()
    return left, ranks.control.passages()


@pytest.mark.slow
def test_one_of_two_workers_dies_in_the_middle(two: Box, quiet_two: Quiet):
    left, passed = quiet_two
    assert two.run(Plan(first(passed, "after answers"), "worker"), **SHARED) == left


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["worker", "evaluator", "server"])
def test_kills_of_a_job_on_two_workers(victim: str, two: Box, quiet_two: Quiet, subtests: pytest.Subtests):
    """At the first passage of each step: how many answers come at once depends on the workers."""
    left, passed = quiet_two
    for point in firsts(passed):
        with subtests.test(f"the {victim} dies {point}"):
            assert two.run(Plan(point, victim), **SHARED) == left


@pytest.mark.slow
def test_a_rank_dies_in_the_middle(ranks: Box, quiet_ranks: Quiet):
    left, passed = quiet_ranks
    lost = [*ranks.control.alive("rank"), *ranks.control.alive("worker")]
    assert len(lost) == 2
    assert ranks.run(Plan(first(passed, "after answers"), "rank")) == left
    assert not set(lost) & {*ranks.control.alive("rank"), *ranks.control.alive("worker")}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_a_rank_stops_in_the_middle(victim: str, ranks: Box, quiet_ranks: Quiet):
    """All of them are killed, the one that waits for the other too, and replaced."""
    left, passed = quiet_ranks
    ranks.settle()
    stopped = [*ranks.control.alive("rank"), *ranks.control.alive("worker")]
    assert len(stopped) == 2
    assert ranks.run(Plan(first(passed, "after answers"), victim, signal.SIGSTOP)) == left
    assert not set(stopped) & {*ranks.control.alive("rank"), *ranks.control.alive("worker")}
    assert f"has made no progress for {STALL_SECONDS:g} s and is killed" in ranks.service.log()


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", ["rank", "worker", "evaluator", "server"])
def test_kills_with_ranks_alive(victim: str, ranks: Box, quiet_ranks: Quiet, subtests: pytest.Subtests):
    left, passed = quiet_ranks
    for point in firsts(passed):
        with subtests.test(f"the {victim} dies {point}"):
            assert ranks.run(Plan(point, victim)) == left


def first(passed: Sequence[Point], step: str) -> Point:
    return next(point for point in passed if point.step == step)


def firsts(passed: Sequence[Point]) -> list[Point]:
    return [point for point in passed if point.number == 1]

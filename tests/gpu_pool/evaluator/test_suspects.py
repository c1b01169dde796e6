"""Which request kills: found in a bounded number of deaths, whatever is in the chunk, and never an innocent one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.evaluator.requests import Unit
from gpu_pool.evaluator.suspects import (
    MOST_DEATHS,
    MOST_DEATHS_ALONE,
    MOST_KILLS_ALONE,
    MOST_SOON_KILLS_ALONE,
    SOON_SECONDS,
    Suspect,
    Suspects,
)


def make_units(count: int) -> list[Unit]:
    return [Unit(prompt=(i,), continuation=(1,)) for i in range(count)]


class Trial:
    """Ask suspects, as workers that die on some units would, until none is left."""

    def __init__(self, units: list[Unit], deadly: set[int]) -> None:
        self.deaths = 0
        self.answered: list[Unit] = []
        self.causes: list[Unit] = []
        self._deadly = [units[i] for i in deadly]
        self.suspects = Suspects()
        self._ask(Suspect(units))
        while suspect := self.suspects.take():
            self._ask(suspect)

    def _ask(self, suspect: Suspect) -> None:
        if not any(unit in self._deadly for unit in suspect.units):
            self.answered += suspect.units
            return
        self.deaths += 1
        if cause := self.suspects.died(suspect):
            self.causes.append(cause)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 100])
def test_one_request_is_found_in_few_deaths(count: int) -> None:
    for deadly in range(0, count, max(1, count // 7)):
        units = make_units(count)
        trial = Trial(units, {deadly})
        assert trial.causes == [units[deadly]]
        assert trial.answered == units[:deadly] + units[deadly + 1 :]
        for_a_chunk = MOST_DEATHS + math.ceil(math.log2(count)) - 1 if count > 1 else 0
        assert trial.deaths <= for_a_chunk + MOST_DEATHS_ALONE


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_exactly_those_that_kill_are_found(case: tuple[int, set[int]]) -> None:
    count, deadly = case
    units = make_units(count)
    trial = Trial(units, deadly)
    assert trial.causes == [unit for i, unit in enumerate(units) if i in deadly]
    assert sorted(map(id, trial.answered + trial.causes)) == sorted(map(id, units))


def test_deaths_by_chance_are_forgiven() -> None:
    suspects = Suspects()
    (unit,) = make_units(1)
    suspect = Suspect([unit])
    for _ in range(3):
        assert suspects.died(suspect) is None
        suspect = suspects.take()
        assert suspect is not None
        assert suspect.units == [unit]
        assert not suspects


@pytest.mark.parametrize("count", [1, 4])
def test_those_that_another_job_gives_back_are_suspected_as_before(count: int) -> None:
    suspects = Suspects()
    units = make_units(count)
    (new,) = make_units(1)
    suspects.died(Suspect(units))
    assert suspects.waiting == units
    assert suspects.take()
    assert suspects.recall([new, *units]) == [new]
    again = suspects.take()
    assert again is not None
    assert (list(again.units), again.deaths) == (units, 1)


def test_what_became_of_some_says_nothing_of_those_that_were_elsewhere() -> None:
    suspects = Suspects()
    units = make_units(3)
    suspects.died(Suspect(units))
    suspect = suspects.take()
    assert suspect is not None
    suspect.keep(units[:1])
    while (cause := suspects.died(suspect)) is None:
        assert suspects.take() is suspect
    assert cause is units[0]
    assert suspects.recall(units[1:]) == []
    several = suspects.take()
    assert several is not None
    assert (list(several.units), several.deaths) == (units[1:], 1)
    assert suspects.recall(units[2:]) == []
    alone = suspects.take()
    assert alone is not None
    assert (list(alone.units), alone.deaths) == (units[2:], 0)


def test_an_error_that_the_worker_survives_needs_no_second_try() -> None:
    suspects = Suspects()
    units = make_units(2)
    assert suspects.failed(Suspect(units)) is None
    halves = [suspects.take(), suspects.take()]
    assert [half and list(half.units) for half in halves] == [[units[0]], [units[1]]]
    assert halves[1] is not None
    assert suspects.failed(halves[1]) is units[1]


@pytest.mark.parametrize(
    ("from_outside", "after_s", "most"),
    [
        (False, 60.0, MOST_DEATHS_ALONE),
        (True, 0.1, MOST_SOON_KILLS_ALONE),
        (True, SOON_SECONDS, MOST_KILLS_ALONE),
    ],
)
def test_how_a_worker_ended_says_how_much_its_end_says(from_outside: bool, after_s: float, most: int) -> None:
    suspects, suspect = Suspects(), Suspect(make_units(1))
    for _ in range(most - 1):
        assert suspects.died(suspect, from_outside=from_outside, after_s=after_s) is None
        assert suspects.take() is suspect
    assert suspects.died(suspect, from_outside=from_outside, after_s=after_s) is suspect.units[0]


def test_what_others_kill_is_not_added_to_what_ends_by_itself() -> None:
    suspects, suspect = Suspects(), Suspect(make_units(1))
    for _ in range(MOST_DEATHS_ALONE - 1):
        assert suspects.died(suspect) is None
        assert suspects.died(suspect, from_outside=True) is None

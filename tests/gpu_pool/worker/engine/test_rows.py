"""Requests as distinct inputs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool.worker.engine.rows import plan_rows

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=20), st.integers(6, 12))
def test_every_request_is_a_target_of_its_input(requests, max_length):
    rows = plan_rows(requests, max_length)
    assert len({row.tokens for row in rows}) == len(rows)
    targets = {index: (row, continuation) for row in rows for index, continuation in row.targets}
    assert sorted(targets) == list(range(len(requests)))
    for index, (context, continuation) in enumerate(requests):
        row, target = targets[index]
        assert target == continuation
        assert len(row.tokens) <= max_length
        assert (context + continuation)[:-1][-max_length:] == row.tokens
        assert row.first_scored <= len(row.tokens) - len(continuation)
    for row in rows:
        assert row.first_scored == len(row.tokens) - max(len(continuation) for _, continuation in row.targets) >= 0


@pytest.mark.parametrize(
    ("context", "continuation", "problem"),
    [((), (1,), "empty"), ((1,), (), "empty"), ((1,), (1,) * 9, "9 tokens exceeds the context of 8")],
)
def test_refused(context, continuation, problem):
    with pytest.raises(ValueError, match=problem):
        plan_rows([(context, continuation)], 8)

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gpu_pool.evaluator.requests import Unit, rolling_windows

PREFIX = 7
ids = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def unit(prompt: list[int], continuation: list[int]) -> Unit:
    return Unit(prompt=np.array(prompt, np.uint32), continuation=np.array(continuation, np.uint32))


@given(tokens=ids, max_length=st.integers(1, 45))
def test_rolling_windows_are_lm_evals(tokens: list[int], max_length: int) -> None:
    windows = get_rolling_token_windows(tokens, prefix_token=PREFIX, max_seq_len=max_length, context_len=1)
    found = rolling_windows(np.array(tokens, np.uint32), PREFIX, max_length)
    assert [(context.tolist(), more.tolist()) for context, more in found] == list(map(make_disjoint_window, windows))


@given(units=st.lists(st.tuples(ids, ids)))
def test_units_sort_as_their_tokens(units: list[tuple[list[int], list[int]]]) -> None:
    found = sorted((unit(*tokens) for tokens in units), key=lambda unit: unit.order)
    sequences = [[*unit.prompt.tolist(), *unit.continuation.tolist()] for unit in found]
    assert sequences == sorted(prompt + continuation for prompt, continuation in units)


def test_an_answered_unit_forgets_its_tokens() -> None:
    answered = unit([1, 2], [3])
    assert answered.cost == 3
    answered.forget_tokens()
    assert answered.cost == 0

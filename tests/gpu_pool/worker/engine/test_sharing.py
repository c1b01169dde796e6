"""What rows attend to apart, and what is copied into their slots."""

from __future__ import annotations

import random

import pytest

from gpu_pool.worker.engine.blocks import BlockPath, Tokens
from gpu_pool.worker.engine.sharing import LEAST_SAVED, shared_lengths
from gpu_pool.worker.engine.token_tree import lay_out

PREFIX = tuple(range(1000, 1000 + LEAST_SAVED))


@pytest.fixture
def share_as_long_prompts_do() -> None:
    """These are long enough."""


def paths_of(sequences: list[Tokens]) -> list[BlockPath]:
    return lay_out(sequences, [len(tokens) - 1 for tokens in sequences], longest_block=2048).paths


def shared(sequences: list[Tokens], counts: list[int] | None = None) -> list[int]:
    return shared_lengths(paths_of(sequences), counts or [1] * len(sequences))


def test_a_long_beginning_stays_where_all_find_it() -> None:
    assert shared([(*PREFIX, 1, 1), (*PREFIX, 2, 2), (*PREFIX, 3)]) == [LEAST_SAVED] * 3


def test_few_tokens_that_some_rows_share_are_copied() -> None:
    """Questions begin alike now and then: a call a layer for each such pair would cost more than it saves."""
    sequences = [(*PREFIX, 1, 1, 1), (*PREFIX, 1, 1, 2), (*PREFIX, 2, 2, 1), (*PREFIX, 2, 2, 2), (*PREFIX, 3)]
    assert shared(sequences) == [LEAST_SAVED] * 5


def test_a_long_second_beginning_is_attended_to_apart_as_well() -> None:
    second = tuple(range(2000, 2000 + LEAST_SAVED))
    sequences = [(*PREFIX, 1), (*PREFIX, *second, 1), (*PREFIX, *second, 2)]
    assert shared(sequences) == [LEAST_SAVED, 2 * LEAST_SAVED, 2 * LEAST_SAVED]


def test_rows_that_leave_early_share_what_is_worth_it() -> None:
    sequences = [(*PREFIX[:10], 5), (*PREFIX[:200], 5), *((*PREFIX, i) for i in range(3))]
    assert shared(sequences) == [0, 200, LEAST_SAVED, LEAST_SAVED, LEAST_SAVED]


def test_nothing_is_shared_alone_or_for_little() -> None:
    assert shared([PREFIX]) == [0]
    assert shared([(1, 2, 3), (1, 2, 4)]) == [0, 0]
    assert shared([(1, 2, 3), (4, 5, 6)]) == [0, 0]


def test_repeats_count_as_rows() -> None:
    assert shared([PREFIX], [2]) == [LEAST_SAVED]
    assert shared([PREFIX[: LEAST_SAVED // 4]], [5]) == [LEAST_SAVED // 4]
    assert shared([PREFIX[: LEAST_SAVED // 4]], [4]) == [0]


def test_what_stays_is_a_beginning_that_others_have_too() -> None:
    source = random.Random(0)
    beginnings = [tuple(source.randrange(5) for _ in range(source.randint(0, 300))) for _ in range(6)]
    sequences = sorted(
        {(*source.choice(beginnings), *(source.randrange(5) for _ in range(source.randint(1, 40)))) for _ in range(60)}
    )
    lengths = shared(sequences)
    assert any(lengths)
    assert not all(lengths)
    for sequence, length in zip(sequences, lengths, strict=True):
        assert length <= len(sequence)
        assert not length or sum(other[:length] == sequence[:length] for other in sequences) > 1


def test_a_few_long_prompts_do_not_make_all_slots_long() -> None:
    short = [(index, 5, 6) for index in range(1, 21)]
    assert shared([*short, (90, *PREFIX), (91, *PREFIX)]) == [0] * 20 + [LEAST_SAVED + 1] * 2
    assert shared([(90, *PREFIX), (91, *PREFIX)]) == [0, 0]  # slots that are all used

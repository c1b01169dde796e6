from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from token_trees import trees

from gpu_pool.evaluator.requests import Unit
from gpu_pool.evaluator.trie_order import in_trie_order
from gpu_pool.token_sequences import token_bytes

Tokens = tuple[int, ...]


def ordered(sequences: Sequence[Tokens]) -> list[Tokens]:
    """Prompts to be continued: all their tokens are read."""
    return [tuple(unit.prompt) for unit in in_trie_order(Unit(prompt=tokens) for tokens in sequences)]


def shared(one: Tokens, other: Tokens) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_nothing_and_one() -> None:
    assert ordered([]) == []
    assert ordered([(1, 2)]) == [(1, 2)]


def test_the_largest_part_comes_last() -> None:
    line = (5,) * 10
    branches = [(*line[:place], token) for place in range(5) for token in (1, 9)]
    assert ordered([line, *branches]) == [*branches, line]


def test_what_others_begin_with_comes_before_them() -> None:
    assert ordered([(1, 2, 3, 4), (1, 2), (1,), (1, 2, 9)]) == [(1,), (1, 2), (1, 2, 9), (1, 2, 3, 4)]


def test_what_reads_the_same_is_side_by_side() -> None:
    units = [Unit(prompt=(1, 2), continuation=(choice,)) for choice in (7, 3, 5)]
    other = Unit(prompt=(1, 2, 3), continuation=(4,))
    found = in_trie_order([units[0], other, *units[1:]])
    assert found == [units[1], units[2], units[0], other]


@given(trees(), trees(), st.randoms())
def test_what_goes_on_from_what_was_read_last_comes_first(
    sequences: list[Tokens], others: list[Tokens], random
) -> None:
    last = random.choice(others)
    units = in_trie_order([Unit(prompt=tokens) for tokens in sequences], token_bytes(last))
    found = [tuple(unit.prompt) for unit in units]
    assert sorted(found) == sorted(sequences)
    beyond = [tokens for tokens in found if last[: len(tokens)] != tokens]
    assert all(shared(last, beyond[0]) >= shared(last, tokens) for tokens in beyond)
    for index, tokens in enumerate(found[1:], 1):
        assert shared(found[index - 1], tokens) == max(shared(before, tokens) for before in found[:index])


@given(trees(), st.randoms())
def test_nothing_is_shared_but_with_the_one_before(sequences: list[Tokens], random) -> None:
    random.shuffle(sequences)
    found = ordered(sequences)
    assert sorted(found) == sorted(sequences)
    for index, tokens in enumerate(found[1:], 1):
        assert shared(found[index - 1], tokens) == max(shared(before, tokens) for before in found[:index])


@given(trees())
def test_what_comes_later_leaves_any_unit_at_few_places(sequences: list[Tokens]) -> None:
    found = ordered(sequences)
    size = sum(len(tokens) for tokens in sequences)
    for index, tokens in enumerate(found):
        left = {shared(tokens, after) for after in found[index + 1 :]} - {0, len(tokens)}
        assert len(left) <= math.log2(size) + 1


def test_a_deep_trie() -> None:
    sequences = [tuple(range(place)) for place in range(1, 3000)]
    assert ordered(sequences[::-1]) == sequences

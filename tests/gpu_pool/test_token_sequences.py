from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_pool import token_sequences
from gpu_pool.token_sequences import MalformedSequences, TokenSequences, common_prefix, token_bytes

TOKENS = st.integers(0, 2) | st.integers(0, 2**32 - 1)
SEQUENCES = st.lists(st.lists(TOKENS, max_size=8), max_size=12)


@given(SEQUENCES)
def test_what_is_packed_comes_back(sequences: list[list[int]]) -> None:
    packed = TokenSequences.pack(sequences)
    assert packed.unpack() == sequences
    assert len(packed) == len(sequences)


@given(SEQUENCES)
def test_sorted_sequences_take_one_token_for_each_node_of_their_trie(sequences: list[list[int]]) -> None:
    nodes = {tuple(sequence[: end + 1]) for sequence in sequences for end in range(len(sequence))}
    assert len(TokenSequences.pack(sorted(sequences)).tokens) == 4 * len(nodes)


@pytest.mark.parametrize("convert", [tuple, lambda ids: array("I", ids), lambda ids: np.array(ids, dtype=np.uint32)])
def test_all_forms_of_tokens_are_packed_alike(convert: Any) -> None:
    sequences = [[1, 2, 2**32 - 1], [1, 2, 4, 5], []]
    assert TokenSequences.pack(map(convert, sequences)) == TokenSequences.pack(sequences)


def test_a_strided_view_is_packed_as_what_it_shows() -> None:
    assert TokenSequences.pack([np.arange(10, dtype=np.uint32)[::3]]).unpack() == [[0, 3, 6, 9]]


@pytest.mark.parametrize(
    "tokens", [[-1], [2**32], [1.5], ["a"], b"abcd", np.array([1]), np.array([[1]], dtype=np.uint32), array("f", [1.0])]
)
def test_what_are_no_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(ValueError, match="token ids must be unsigned 32-bit integers"):
        TokenSequences.pack([tokens])


@given(st.lists(TOKENS, max_size=40), st.lists(TOKENS, max_size=5), st.lists(TOKENS, max_size=5))
def test_common_prefix(prefix: list[int], one: list[int], other: list[int]) -> None:
    first, second = prefix + one, prefix + other
    expected = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    found = common_prefix(token_bytes(first), token_bytes(second))
    assert found == (min(len(first), len(second)) if expected is None else expected)


def packed(shared: list[int], added: list[int], count: int) -> TokenSequences:
    return TokenSequences(shared=tuple(shared), added=tuple(added), tokens=bytes(4 * count))


@pytest.mark.parametrize(
    ("malformed", "problem"),
    [
        (packed([0], [1, 1], 2), "1 shared lengths, but 2 added"),
        (packed([1], [1], 1), "sequence 0 takes 1 of the 0 tokens"),
        (packed([0, 3], [2, 1], 3), "sequence 1 takes 3 of the 2 tokens"),
        (packed([0, -1], [2, 1], 3), "sequence 1 takes -1"),
        (packed([0, 0], [2, -1], 1), "adds -1"),
        (packed([0], [2], 1), "2 tokens are announced, but 4 bytes"),
        (packed([0], [1], 2), "1 tokens are announced, but 8 bytes"),
        (TokenSequences(shared=(0,), added=(1,), tokens=b"abc"), "but 3 bytes"),
    ],
)
def test_what_contradicts_itself_is_refused(malformed: TokenSequences, problem: str) -> None:
    with pytest.raises(MalformedSequences, match=problem):
        malformed.unpack()


def test_a_small_message_cannot_claim_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sequences, "MAX_TOKENS", 1000)
    assert len(packed([0, *[100] * 9], [100, *[0] * 9], 100).unpack()) == 10
    with pytest.raises(MalformedSequences, match="1100 tokens are more"):
        packed([0, *[100] * 10], [100, *[0] * 10], 100).unpack()


@given(SEQUENCES)
def test_it_survives_the_wire(sequences: list[list[int]]) -> None:
    sent = msgspec.msgpack.encode(TokenSequences.pack(sequences))
    assert msgspec.msgpack.decode(sent, type=TokenSequences).unpack() == sequences

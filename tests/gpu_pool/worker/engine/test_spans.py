"""What attends to what in batches of the blocks of a tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import room_for, tokens_alone, trees

from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.spans import Span, in_window, spans_by_depth
from gpu_pool.worker.engine.token_tree import lay_out, pack


def batches(sequences, longest_block: int, room: int) -> Iterator[tuple[list[int], list[list[Span]]]]:
    """(the position of each token, the spans) of each batch."""
    layout = lay_out(sequences, [0] * len(sequences), longest_block=longest_block)
    for blocks in pack(layout.blocks, tokens_alone, room_for(room)):
        starts: dict[Block, int] = {}
        positions: list[int] = []
        for block in blocks:
            starts[block] = len(positions)
            positions += range(block.start, block.end)
        yield positions, spans_by_depth(blocks, starts)


PACKED = (trees(), st.sampled_from([3, 50, 10**9]), st.sampled_from([1, 40, 10**9]))


@settings(max_examples=100)
@given(*PACKED)
def test_every_token_sees_all_before_it_once(sequences, longest_block, room):
    for positions, depths in batches(sequences, longest_block, room):
        seen: list[list[int]] = [[] for _ in positions]
        for depth, spans in enumerate(depths):
            assert all(span.queries == span.length for span in spans) or depth
            assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
            for span in spans:
                queries = positions[span.start : span.end]
                assert (min(queries), max(queries)) == (span.first_position, span.last_position)
                keys = range(span.key_position, span.key_position + span.length)
                if span.block is None:
                    assert positions[span.key_start : span.key_start + span.length] == list(keys)
                else:
                    assert span.block.start + span.key_start == span.key_position
                for token, position in enumerate(queries, span.start):
                    seen[token] += [key for key in keys if depth or key <= position]
        for position, keys in zip(positions, seen, strict=True):
            assert sorted(keys) == list(range(position + 1))


@settings(max_examples=100)
@given(*PACKED, st.integers(1, 70))
def test_a_window_takes_away_what_no_query_sees(sequences, longest_block, room, window):
    def pairs(spans: list[Span], positions: list[int]) -> set[tuple[int, int]]:
        """(token, position of a key that it sees)"""
        return {
            (token, key)
            for span in spans
            for token in range(span.start, span.end)
            for key in range(span.key_position, span.key_position + span.length)
            if positions[token] - key < window
        }

    for positions, depths in batches(sequences, longest_block, room):
        for spans in depths:
            seen = in_window(spans, window)
            assert pairs(seen, positions) == pairs(spans, positions)
            assert all(span.first_position - span.key_position < window for span in seen)


@pytest.mark.parametrize(("window", "kept"), [(100, (0, 10)), (20, (0, 10)), (19, (1, 9)), (11, (9, 1)), (10, None)])
def test_clipping(window, kept):
    span = Span(start=5, end=8, first_position=19, last_position=21, key_start=0, length=10, key_position=0)
    found = [(clipped.key_start, clipped.length) for clipped in in_window([span], window)]
    assert found == ([] if kept is None else [kept])

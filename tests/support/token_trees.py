"""Sets of token sequences for property-based tests, and batches bounded by their tokens alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.token_tree import Room

Tokens = tuple[int, ...]


def distinct(sequences: Iterable[Sequence[int]]) -> list[Tokens]:
    """As `lay_out` wants them."""
    return sorted({tuple(sequence) for sequence in sequences if sequence})


def tokens_alone(block: Block) -> Room:
    """What a block takes where only tokens count."""
    return Room(len(block.tokens), 0, 0, 0)


def room_for(tokens: int) -> Room:
    return Room(tokens, math.inf, math.inf, math.inf)


@st.composite
def trees(draw: st.DrawFn) -> list[Tokens]:
    """Sequences that branch off earlier ones anywhere."""
    found: list[Tokens] = []
    for _ in range(draw(st.integers(1, 12))):
        beginning = draw(st.sampled_from([(), *found]))
        kept = draw(st.integers(0, len(beginning)))
        repeats = draw(st.sampled_from([1, 1, 9, 60]))
        found.append(beginning[:kept] + tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))) * repeats)
    return distinct(found)


@st.composite
def needs(draw: st.DrawFn, sequences: Sequence[Tokens]) -> list[int]:
    """From which position of each sequence on outputs are needed: the last one's at least."""
    return [draw(st.integers(0, len(tokens) - 1)) for tokens in sequences]

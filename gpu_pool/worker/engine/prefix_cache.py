# pyright: basic
"""Keys and values of beginnings that many requests share, kept between chunks, tasks and jobs within a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from gpu_pool.worker.engine.blocks import BlockPath, Tokens, common_prefix
from gpu_pool.worker.engine.kept_scores import NO_SCORES, Computed, Scores, comparable, scores_along
from gpu_pool.worker.engine.packed import hold, kept_bytes, release
from gpu_pool.worker.engine.token_tree import MOST_SHARED, Layout

MIN_TOKENS = 16
"""Shorter beginnings are computed as fast as they are looked back at."""
MIN_SHARED = 2
"""Of those that many requests of a chunk share: where requests are short, they would be a good part of the next one."""
MOST_KEPT = 256
"""Beginnings kept in all: each is compared with every chunk."""


class Beginning(NamedTuple):
    """What sequences begin with, and what is known of it."""

    tokens: Tokens
    path: BlockPath
    """The blocks that hold their keys and values."""
    scores: Scores
    """Of those tokens that have been scored."""


class PrefixCache:
    """Least recently used beginnings go first. Blocks are freed when no beginning and no computation uses them."""

    def __init__(self, max_bytes: int, grid: int = 1) -> None:
        """`grid`: tokens of a block where scores must be the same to the bit whatever chunk they come from."""
        self.max_bytes = max_bytes
        self.grid = grid
        self._kept: OrderedDict[Tokens, Beginning] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Memory of the keys, values and scores held."""
        blocks = {source.block for beginning in self._kept.values() for source in beginning.path.sources}
        return sum(map(kept_bytes, blocks)) + sum(beginning.scores.nbytes for beginning in self._kept.values())

    def find(self, sequences: Sequence[Tokens]) -> list[Beginning]:
        """What is known of the beginnings of `sequences` (sorted), each once.

        The shortest that is kept counts as used, so that what others went on with after it grows old.
        """
        found: dict[Tokens, Beginning] = {}
        for tokens, path, scores in sorted(self._kept.values(), key=lambda beginning: len(beginning.tokens)):
            place = bisect_left(sequences, tokens)
            near = sequences[max(0, place - 1) : place + 1]
            same = max((common_prefix(tokens, sequence) for sequence in near), default=0)
            if same < min(MIN_TOKENS, len(tokens)):
                continue
            begun = tokens[:same]
            if begun not in found:
                found[begun] = Beginning(begun, path.until(same), NO_SCORES)
                self._kept.move_to_end(tokens)
            found[begun] = _with_scores(found[begun], scores, comparable(same, self.grid))
        return list(found.values())

    def reserve(
        self, layout: Layout, sequences: Sequence[Tokens], last: int, scores: Sequence[Scores] = ()
    ) -> list[Beginning]:
        """Beginnings of `sequences` worth keeping: their blocks will be kept when they are computed.

        They are some that many requests share, and sequence `last`, where the next chunk goes on, with the `scores`
        that are known of each sequence. Give them to `keep` or `release_all` afterwards.
        """
        shared = [(index, length, MIN_SHARED) for index, length in layout.shared[:MOST_SHARED]]
        reserved: list[Beginning] = []
        for index, length, least in (*shared, (last, len(sequences[last]), MIN_TOKENS)):
            if length >= least:
                path = layout.paths[index].until(length)
                hold(path)
                beginning = Beginning(sequences[index][:length], path, NO_SCORES)
                reserved.append(_with_scores(beginning, scores[index], length) if scores else beginning)
        return reserved

    def keep(self, reserved: Sequence[Beginning], computed: Computed | None = None) -> None:
        """Remember these, whose blocks are `computed` by now, with the scores; forget the oldest beyond the bound."""
        for beginning in reserved:
            if computed:
                own = scores_along(beginning.path, beginning.tokens, computed)
                beginning = _with_scores(beginning, own, len(beginning.tokens))
            if (before := self._kept.pop(beginning.tokens, None)) is not None:
                release(beginning.path.sources)
                beginning = _with_scores(before, beginning.scores, len(before.tokens))
            self._kept[beginning.tokens] = beginning
        while len(self._kept) > MOST_KEPT or (self._kept and self.bytes > self.max_bytes):
            release(self._kept.popitem(last=False)[1].path.sources)

    def clear(self) -> None:
        """Forget everything."""
        release_all(list(self._kept.values()))
        self._kept.clear()


def release_all(beginnings: Sequence[Beginning]) -> None:
    for beginning in beginnings:
        release(beginning.path.sources)


def _with_scores(beginning: Beginning, scores: Scores, end: int) -> Beginning:
    """`beginning`, and of its first `end` tokens the `scores` that it has not."""
    return beginning._replace(scores=beginning.scores.and_those_of(scores, end)) if scores.nbytes else beginning

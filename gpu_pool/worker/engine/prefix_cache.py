# pyright: basic
"""Keys and values of beginnings that many requests share, kept between chunks, tasks and jobs within a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from gpu_pool.worker.engine.blocks import Block, BlockPath, Tokens, common_prefix
from gpu_pool.worker.engine.kept_scores import NO_SCORES, Computed, Scores, comparable, scores_along
from gpu_pool.worker.engine.packed import hold, kept_bytes, release, shorten
from gpu_pool.worker.engine.prefix_tree import shared_beginnings
from gpu_pool.worker.engine.token_tree import Layout

MIN_TOKENS = 16
"""Shorter beginnings are computed as fast as they are looked back at."""
MIN_SHARED = 2
"""Of those that many requests of a chunk share: where requests are short, they would be a good part of the next one."""
MOST_KEPT = 256
"""Beginnings kept in all: each is compared with every chunk."""
LARGEST_SHARE = 0.5
"""Of the memory, for one beginning: that of a long document must not take the place of all others."""
_MOST_SHARED = 16
"""Beginnings of one chunk that are kept because many of its requests share them."""
_LEAST_SHARED_BY = 8
"""Requests that share such a beginning."""


class Beginning(NamedTuple):
    """What sequences begin with, and what is known of it."""

    tokens: Tokens
    path: BlockPath
    """The blocks that hold their keys and values."""
    scores: Scores
    """Of those tokens that have been scored."""


class PrefixCache:
    """Least recently used beginnings go first. Blocks are freed when no beginning and no computation uses them."""

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        """`token_bytes`: of a token's keys and values."""
        self.max_bytes = max_bytes
        self.token_bytes = token_bytes
        self.grid = 1
        """Tokens of a block where scores must be the same to the bit whatever chunk they come from."""
        self._kept: OrderedDict[tuple[int, Tokens], Beginning] = OrderedDict()
        """By the grid of their blocks and their tokens."""

    def of_grid(self, grid: int) -> PrefixCache:
        """A cache for blocks of another grid, in the same memory: the bound is one for both, and `clear` is of both."""
        other = PrefixCache(self.max_bytes, self.token_bytes)
        other.grid, other._kept = grid, self._kept
        return other

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
        own = [beginning for (grid, _), beginning in self._kept.items() if grid == self.grid]
        for tokens, path, scores in sorted(own, key=lambda beginning: len(beginning.tokens)):
            place = bisect_left(sequences, tokens)
            near = sequences[max(0, place - 1) : place + 1]
            same = max((common_prefix(tokens, sequence) for sequence in near), default=0)
            if same < min(MIN_TOKENS, len(tokens)):
                continue
            begun = tokens[:same]
            if begun not in found:
                found[begun] = Beginning(begun, path.until(same), NO_SCORES)
                self._kept.move_to_end((self.grid, tokens))
            found[begun] = _with_scores(found[begun], scores, comparable(same, self.grid))
        return list(found.values())

    def reserve(
        self,
        layout: Layout,
        sequences: Sequence[Tokens],
        last: int,
        scores: Sequence[Scores] = (),
        *,
        shared_by: int = _LEAST_SHARED_BY,
    ) -> list[Beginning]:
        """Beginnings of `sequences` worth keeping: their blocks will be kept when they are computed.

        They are sequence `last`, where the next chunk goes on, and some that many requests share, `shared_by` at least;
        of each as much as its part of the memory holds, and no more of them than all of it. `scores` are known of each
        sequence. Give them to `keep` or `release_all` afterwards.
        """
        reserved: list[Beginning] = []
        most, held = self.max_bytes // self.token_bytes, dict[Block, int]()
        for index, length, least in ((last, len(sequences[last]), MIN_TOKENS), *_shared(layout, shared_by)):
            path = layout.paths[index].until(min(length, int(LARGEST_SHARE * most)))
            after = held | {block: max(tokens, held.get(block, 0)) for block, tokens in path.sources}
            if path.end < least or sum(after.values()) > most:
                continue
            held = after
            hold(path)
            beginning = Beginning(sequences[index][: path.end], path, NO_SCORES)
            reserved.append(_with_scores(beginning, scores[index], path.end) if scores else beginning)
        return reserved[::-1]  # what goes on is the latest

    def keep(self, reserved: Sequence[Beginning], computed: Computed | None = None) -> None:
        """Remember these, whose blocks are `computed` by now, with the scores; forget the oldest beyond the bound."""
        for beginning in reserved:
            key = (self.grid, beginning.tokens)
            if computed:
                own = scores_along(beginning.path, beginning.tokens, computed)
                beginning = _with_scores(beginning, own, len(beginning.tokens))
            if (before := self._kept.pop(key, None)) is not None:
                release(beginning.path.sources)
                beginning = _with_scores(before, beginning.scores, len(before.tokens))
            self._kept[key] = beginning
        if self.bytes > self.max_bytes:
            self._shorten()
        while len(self._kept) > MOST_KEPT or (self._kept and self.bytes > self.max_bytes):
            release(self._kept.popitem(last=False)[1].path.sources)

    def _shorten(self) -> None:
        """Free keys and values of tokens beyond what is kept, which others have looked back at and do so no more."""
        kept: dict[Block, list[int]] = {}
        for beginning in self._kept.values():
            for block, length in beginning.path.sources:
                kept.setdefault(block, []).append(length)
        for block, lengths in kept.items():
            if block.users == len(lengths) and block.reach > max(lengths):
                shorten(block, max(lengths))

    def clear(self) -> None:
        """Forget everything."""
        release_all(list(self._kept.values()))
        self._kept.clear()


def release_all(beginnings: Sequence[Beginning]) -> None:
    for beginning in beginnings:
        release(beginning.path.sources)


def _shared(layout: Layout, shared_by: int) -> list[tuple[int, int, int]]:
    """(sequence, length, least length that is worth keeping) of beginnings that many share."""
    if layout.tree is None:
        return []
    many = max(shared_by, len(layout.paths) // _MOST_SHARED)
    return [(index, length, MIN_SHARED) for index, length in shared_beginnings(layout.tree, many)[:_MOST_SHARED]]


def _with_scores(beginning: Beginning, scores: Scores, end: int) -> Beginning:
    """`beginning`, and of its first `end` tokens the `scores` that it has not."""
    return beginning._replace(scores=beginning.scores.and_those_of(scores, end)) if scores.nbytes else beginning

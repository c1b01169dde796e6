# pyright: basic
"""Keys and values of beginnings that many requests share, kept between chunks, tasks and jobs within a bound."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpu_pool.worker.engine.packed import hold, kept_bytes, release
from gpu_pool.worker.engine.token_tree import Layout, Path, Tokens, common_prefix, lay_out, lay_out_grid

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

MIN_TOKENS = 16
"""Shorter beginnings are computed as fast as they are looked back at."""
MOST_SHARED = 16
"""Beginnings kept of one chunk."""
MOST_KEPT = 256
"""Beginnings kept in all: each is compared with every chunk."""
_LEAST_SHARED_BY = 8
GRID = 128
"""Tokens of a block where bits must not depend on what sequences share: enough to use the device well."""


class PrefixCache:
    """Least recently used beginnings go first. Blocks are freed when no beginning and no computation uses them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._paths: OrderedDict[Tokens, Path] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def bytes(self) -> int:
        """Memory of the keys and values held."""
        blocks = {source.block for path in self._paths.values() for source in path.sources}
        return sum(map(kept_bytes, blocks))

    def find(self, sequences: Sequence[Tokens]) -> list[tuple[Tokens, Path]]:
        """What is known of the beginnings of `sequences` (sorted): (tokens, path that holds them), each once.

        The shortest that is kept counts as used, so that what others went on with after it grows old.
        """
        found: dict[Tokens, Path] = {}
        for tokens, path in sorted(self._paths.items(), key=lambda entry: len(entry[0])):
            place = bisect_left(sequences, tokens)
            near = sequences[max(0, place - 1) : place + 1]
            same = max((common_prefix(tokens, sequence) for sequence in near), default=0)
            if same >= MIN_TOKENS and tokens[:same] not in found:
                found[tokens[:same]] = path.until(same)
                self._paths.move_to_end(tokens)
        return list(found.items())

    def reserve(self, layout: Layout, sequences: Sequence[Tokens]) -> list[tuple[Tokens, Path]]:
        """Beginnings of `sequences` worth keeping: their blocks will be kept when they are computed.

        They are some that many requests share, and the last sequence, where the next chunk goes on. Give them to
        `keep` or `release_all` afterwards.
        """
        wanted = [*layout.shared[:MOST_SHARED], (len(sequences) - 1, len(sequences[-1]))]
        reserved: list[tuple[Tokens, Path]] = []
        for index, length in wanted:
            if length >= MIN_TOKENS:
                path = layout.paths[index].until(length)
                hold(path)
                reserved.append((sequences[index][:length], path))
        return reserved

    def keep(self, reserved: Sequence[tuple[Tokens, Path]]) -> None:
        """Remember these, whose blocks are computed by now, and forget the oldest beyond the bound."""
        for tokens, path in reserved:
            if (before := self._paths.pop(tokens, None)) is not None:
                release(before.sources)
            self._paths[tokens] = path
        while len(self._paths) > MOST_KEPT or (self._paths and self.bytes > self.max_bytes):
            release(self._paths.popitem(last=False)[1].sources)

    def clear(self) -> None:
        """Forget everything."""
        release_all(list(self._paths.items()))
        self._paths.clear()


def lay_out_for(
    loaded: LoadedModel,
    sequences: Sequence[Tokens],
    needed_from: Sequence[int],
    known: Sequence[tuple[Tokens, Path]],
    *,
    deterministic: bool,
) -> Layout:
    """The blocks of a chunk's sequences (sorted, distinct): by what they share, or on the fixed grid."""
    if deterministic:
        return lay_out_grid(sequences, needed_from, grid=GRID, known=known)
    return lay_out(
        sequences,
        needed_from,
        longest_block=max(1, min(loaded.limits.scored_tokens, loaded.limits.logits(loaded.vocabulary))),
        known=known,
        shared_by=max(_LEAST_SHARED_BY, len(sequences) // MOST_SHARED),
    )


def release_all(reserved: Sequence[tuple[Tokens, Path]]) -> None:
    for _, path in reserved:
        release(path.sources)

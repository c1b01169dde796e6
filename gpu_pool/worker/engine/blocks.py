"""Blocks of tokens that are computed together, and the paths of blocks that hold sequences. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

Tokens = tuple[int, ...]
_STRIDE = 64


def common_prefix(first: Tokens, second: Tokens) -> int:
    """How many tokens two sequences of one type begin with in common."""
    longest, same = min(len(first), len(second)), 0
    while same < longest and first[same : same + _STRIDE] == second[same : same + _STRIDE]:
        same += _STRIDE
    same = min(same, longest)
    while same < longest and first[same] == second[same]:
        same += 1
    return same


@dataclass(eq=False, slots=True)
class Block:
    """Tokens computed together, each of which sees those before it and what `path` holds.

    Whoever needs a block's keys and values is counted among its `users` until that is over; when the last one leaves,
    they are freed (`packed.release`). Those are: each block that is laid out to look back at it, until it has been
    computed or given up (`packed.finish`); and each path that somebody holds (`packed.hold`): beginnings in the cache,
    prompts on their way into slots. `reach` is the most that any of them has wanted; it does not fall when one leaves,
    only where the cache cuts the block (`packed.shorten`). So a block that has been computed has keys and values of its
    first `reach` tokens while it has users, and none when it has not.
    """

    start: int
    """Position of the first token in its sequences."""
    tokens: Tokens
    path: BlockPath
    """What precedes the block: positions 0 to `start`."""
    sequences: int = 0
    """Sequences that end in this block."""
    users: int = 0
    """How many need its keys and values."""
    reach: int = 0
    """How many of its first tokens are looked back at."""
    keys_values: Any = None
    """Of those tokens, while there are users and the block itself is computed (`packed`)."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Source(NamedTuple):
    """The first `length` tokens of a block, as something to look back at."""

    block: Block
    length: int


@dataclass(frozen=True, slots=True)
class BlockPath:
    """A sequence's first tokens as the blocks that hold them, in order."""

    sources: tuple[Source, ...] = ()

    @property
    def end(self) -> int:
        """Tokens held."""
        return self.sources[-1].block.start + self.sources[-1].length if self.sources else 0

    def then(self, block: Block) -> BlockPath:
        """This path and all of `block`, which begins where it ends."""
        return BlockPath((*self.sources, Source(block, len(block.tokens))))

    def until(self, end: int) -> BlockPath:
        """The first `end` tokens."""
        kept = [source for source in self.sources if source.block.start < end]
        if kept and kept[-1].block.start + kept[-1].length > end:
            kept[-1] = Source(kept[-1].block, end - kept[-1].block.start)
        return BlockPath(tuple(kept))

    def locate(self, start: int, end: int) -> list[tuple[Block, int]]:
        """(block, index in it) of the tokens at positions start to end."""
        return [
            (block, position - block.start)
            for block, length in self.sources
            for position in range(max(start, block.start), min(end, block.start + length))
        ]

"""How token sequences become batches, for scoring and generation alike.

    sequences ──build_tree──► tree ──lay_out──► blocks ──pack──► batches ──run──► forward passes
               `prefix_tree`         here       `blocks` here            `block_queue`  `packed`

**Tree.** Sequences that begin alike share those tokens' keys and values, so each distinct token of their tree need be
computed only once, and not at all where earlier chunks have left it (`known` paths, from the `prefix_cache`), unless
its output is needed: `prefix_tree` has an example.

**Blocks** are runs of tokens along one path, causal among themselves. `lay_out` follows the heaviest path from the root
as one block, and lays out what branches off it, each branch beginning with a block of its own that looks back at the
first tokens of the blocks above it (a heavy-path decomposition: a sequence leaves one block for another at most
log2(distinct tokens) times, however the tree is shaped). What branches off last comes first: no more keys and values
are held at a time than those of one path from the root.

        few-shot prefix ──── question 1 ──── answer A          block 0: prefix, question 1, answer A
              │                   └───────── answer B          block 1: answer B, after the first n tokens of block 0
              └───────────── question 2 ──── …                 block 2: question 2, …, after the prefix in block 0

**Batches.** `pack` takes blocks in that order (what looks back at a block follows it closely) for as long as a forward
pass has room for their tokens, their logits, and the sequences that end in them. A batch is run as one sequence of
tokens [1, T] without any padding; only attention knows what belongs together (`attention`). The room shrinks by what
is kept and where memory does not suffice, so callers take one batch at a time from a `BlockQueue`. By the caller differ

                         outputs needed                    sequences that a pass has room for
    `tree_scoring`       from the first scored token on    the batch size asked for, or any number
    `tree_generation`    after a prompt's last token       slots that are free

**Deterministic** runs have blocks cut at multiples of `GRID` tokens instead (`lay_out_grid`), and each block is a batch
of its own: the bits of an answer then depend on its request alone.

Pure Python, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpu_pool.worker.engine.blocks import Block, BlockPath, Tokens
from gpu_pool.worker.engine.prefix_tree import Node, build_tree, mark_known

GRID = 128
"""Tokens of a block where bits must not depend on what sequences share: enough to use the device well."""
DUPLICATED_SHARE = 0.02
"""A branch computes tokens that it shares again where they are fewer than this share of its own: looking back at a few
tokens costs more than computing them."""


class Room(NamedTuple):
    """What a forward pass may hold, or what a block takes of it."""

    tokens: float
    positions: float
    """Those whose logits are asked for."""
    sequences: float
    """That end there."""
    bytes: float
    """Of keys and values that are kept when it has been run."""

    def and_that(self, other: Room) -> Room:
        """What both take."""
        return Room(
            self.tokens + other.tokens,
            self.positions + other.positions,
            self.sequences + other.sequences,
            self.bytes + other.bytes,
        )

    def holds(self, other: Room) -> bool:
        """Whether there is so much of everything."""
        return (
            other.tokens <= self.tokens
            and other.positions <= self.positions
            and other.sequences <= self.sequences
            and other.bytes <= self.bytes
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """What is to be computed, in order."""

    blocks: list[Block]
    paths: list[BlockPath]
    """Of each sequence: the blocks that hold it."""
    tree: Node | None = None
    """Of the sequences; a grid has none."""

    @property
    def tokens(self) -> int:
        """Tokens to be computed."""
        return sum(len(block.tokens) for block in self.blocks)


def plan(
    sequences: Sequence[Tokens],
    needed_from: Sequence[int],
    room: Room,
    known: Sequence[tuple[Tokens, BlockPath]],
    *,
    deterministic: bool,
) -> Layout:
    """The blocks of a chunk, each of which has room in a forward pass even if all its tokens are scored.

    `sequences` are sorted, distinct and none is empty. `needed_from[i]` is the first position of sequence i whose
    output is needed: tokens from there on are computed even where `known` paths (token sequences whose keys and values
    are kept) hold them.
    """
    if deterministic:
        return lay_out_grid(sequences, needed_from, grid=GRID, known=known)
    longest_block = max(1, int(min(room.tokens, room.positions)))
    return lay_out(sequences, needed_from, longest_block=longest_block, known=known)


def pack(
    blocks: Iterable[Block],
    cost: Callable[[Block], Room],
    room: Room,
    *,
    deterministic: bool = False,
) -> Iterator[list[Block]]:
    """Batches of blocks, in order: of as many as there is `room` for in every respect, but of one at least.

    `deterministic`: of just one. Where the room changes from batch to batch, take the first and ask again for the rest.
    """
    batch: list[Block] = []
    used = Room(0, 0, 0, 0)
    for block in blocks:
        own = cost(block)
        after = used.and_that(own)
        if batch and (deterministic or not room.holds(after)):
            yield batch
            batch, after = [], own
        batch.append(block)
        used = after
    if batch:
        yield batch


def lay_out(
    sequences: Sequence[Tokens],
    needed_from: Sequence[int],
    *,
    longest_block: int,
    known: Sequence[tuple[Tokens, BlockPath]] = (),
) -> Layout:
    """Blocks of at most `longest_block` tokens that hold every distinct token about once; the rest as for `plan`."""
    root = build_tree(sequences, needed_from)
    for tokens, path in sorted(known, key=lambda entry: -len(entry[0])):
        mark_known(root, sequences, needed_from, tokens, path)
    work = _Layouter(sequences, needed_from, longest_block)
    work.lay_children(root, BlockPath())
    return Layout(work.blocks, [work.paths[index] for index in range(len(sequences))], root)


def lay_out_grid(
    sequences: Sequence[Tokens],
    needed_from: Sequence[int],
    *,
    grid: int,
    known: Sequence[tuple[Tokens, BlockPath]] = (),
) -> Layout:
    """Blocks cut at multiples of `grid` positions, whatever the sequences have in common, each to be run alone.

    What a token is computed with then depends on nothing but the tokens before it: where whole blocks are the same they
    are shared, a sequence's last one is its own. `known` paths are of such blocks too; the rest as for `plan`.
    """
    work = _Layouter(sequences, needed_from, grid)
    whole: dict[Tokens, BlockPath] = {(): BlockPath()}
    old = {tokens[:end]: path.until(end) for tokens, path in known for end in range(grid, path.end + 1, grid)}
    floors: dict[Tokens, int] = {}
    for tokens, needed in zip(sequences, needed_from, strict=True):
        for end in range(grid, len(tokens) + 1, grid):
            floors[tokens[:end]] = min(needed, floors.get(tokens[:end], needed))
    for index, tokens in enumerate(sequences):
        path = BlockPath()
        for end in range(grid, len(tokens) + 1, grid):
            if tokens[:end] in whole:
                path = whole[tokens[:end]]
            elif tokens[:end] in old and end <= floors[tokens[:end]]:
                path = old[tokens[:end]]
            else:
                path = whole[tokens[:end]] = work.add_blocks(tokens[:end], path)
        work.paths[index] = work.add_blocks(tokens, path)
    return Layout(work.blocks, [work.paths[index] for index in range(len(sequences))])


class _Layouter:
    """Walks the tree, heaviest path first."""

    def __init__(self, sequences: Sequence[Tokens], needed_from: Sequence[int], longest_block: int) -> None:
        self._sequences = sequences
        self._needed_from = needed_from
        self._longest_block = longest_block
        self.blocks: list[Block] = []
        self.paths: dict[int, BlockPath] = {}

    def lay_children(self, node: Node, path: BlockPath) -> None:
        for child in node.children:
            self._lay(child, path)

    def _lay(self, node: Node, path: BlockPath) -> None:
        """Lay out `node` and everything below it; `path` ends where the node starts, or before."""
        if node.known:
            self._follow_known(node, *node.known)
        else:
            self._lay_heavy(node, self._without_scraps(path, node.size))

    def _follow_known(self, node: Node, path: BlockPath, end: int) -> None:
        """Use the computed `path` up to `end`, and lay out what leaves it or goes on after it (see `prefix_tree`)."""
        while node.end <= end:
            if node.ending is not None:
                self._end(node.ending, path.until(self._needed_from[node.ending]))
            following = None
            for child in node.children:
                if following is None and child.known and child.known[0] is path and child.start < end:
                    following = child
                else:
                    self._lay(child, path.until(min(child.start, child.needed_from)))
            if following is None:
                return
            node = following
        self._lay_heavy(node, path.until(end))

    def _lay_heavy(self, node: Node, path: BlockPath) -> None:
        chain = [node]
        while chain[-1].children:
            chain.append(max(chain[-1].children, key=lambda child: child.size))
        path = self.add_blocks(self._sequences[chain[-1].sequence], path)
        for upper, following in reversed(list(zip(chain, [*chain[1:], None], strict=True))):
            if upper.ending is not None:
                self._end(upper.ending, path.until(upper.end))
            for child in upper.children:
                if child is not following:
                    self._lay(child, path.until(child.start))

    def _end(self, sequence: int, path: BlockPath) -> None:
        """Let a sequence end with what is left of it after `path`, or with the path's last block."""
        self.paths[sequence] = path = self.add_blocks(self._sequences[sequence], path)
        path.sources[-1].block.sequences += 1

    def add_blocks(self, tokens: Tokens, path: BlockPath) -> BlockPath:
        for start in range(path.end, len(tokens), self._longest_block):
            block = Block(start, tokens[start : start + self._longest_block], path)
            for source in path.sources:
                source.block.users += 1
                source.block.reach = max(source.block.reach, source.length)
            self.blocks.append(block)
            path = path.then(block)
        return path

    @staticmethod
    def _without_scraps(path: BlockPath, size: int) -> BlockPath:
        """`path` without last sources that together hold so few tokens that a branch of `size` computes them itself."""
        end = path.end
        while path.sources and end - path.sources[-1].block.start <= DUPLICATED_SHARE * size:
            path = path.until(path.sources[-1].block.start)
        return path

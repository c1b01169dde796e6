"""How many token sequences become few computations: their tree, cut into blocks, packed into batches.

Sequences that begin alike share those tokens' keys and values, so each distinct token of their tree need be computed
only once. `lay_out` cuts the tree into **blocks**: runs of tokens along one path, causal among themselves. It follows
the heaviest path from the root as one block, and lays out what branches off it, each branch beginning with a block of
its own that looks back at the first tokens of the blocks above it (a heavy-path decomposition: a sequence leaves one
block for another at most log2(distinct tokens) times, however the tree is shaped).

        few-shot prefix ──── question 1 ──── answer A          block 0: prefix, question 1, answer A
              │                   └───────── answer B          block 1: answer B, after the first n tokens of block 0
              └───────────── question 2 ──── …                 block 2: question 2, …, after the prefix in block 0

`pack` then fills **batches** with blocks in that order (what looks back at a block follows it closely), to be run as
one sequence of tokens [1, T] without any padding: only attention knows what belongs together (`attention`).

Pure Python, without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Tokens = tuple[int, ...]
DUPLICATED_SHARE = 0.02
"""A branch computes tokens that it shares again where they are fewer than this share of its own: looking back at a few
tokens costs more than computing them."""
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
    """Tokens computed together, each of which sees those before it and what `path` holds."""

    start: int
    """Position of the first token in its sequences."""
    tokens: Tokens
    path: Path
    """What precedes the block: positions 0 to `start`."""
    sequences: int = 0
    """Sequences that end in this block."""
    users: int = 0
    """Blocks not computed yet that look back at this one, and whoever else wants its keys and values to be kept."""
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
class Path:
    """A sequence's first tokens as the blocks that hold them, in order."""

    sources: tuple[Source, ...] = ()

    @property
    def end(self) -> int:
        """Tokens held."""
        return self.sources[-1].block.start + self.sources[-1].length if self.sources else 0

    def then(self, block: Block) -> Path:
        """This path and all of `block`, which begins where it ends."""
        return Path((*self.sources, Source(block, len(block.tokens))))

    def until(self, end: int) -> Path:
        """The first `end` tokens."""
        kept = [source for source in self.sources if source.block.start < end]
        if kept and kept[-1].block.start + kept[-1].length > end:
            kept[-1] = Source(kept[-1].block, end - kept[-1].block.start)
        return Path(tuple(kept))

    def locate(self, start: int, end: int) -> list[tuple[Block, int]]:
        """(block, index in it) of the tokens at positions start to end."""
        return [
            (block, position - block.start)
            for block, length in self.sources
            for position in range(max(start, block.start), min(end, block.start + length))
        ]


@dataclass(eq=False, slots=True)
class _Node:
    """A piece of the tree without a branch: positions `start` to `end` of `sequence`, and what follows it."""

    start: int
    end: int
    sequence: int
    children: list[_Node] = field(default_factory=list)
    ending: int | None = None
    """The sequence that ends here."""
    size: int = 0
    """Tokens of the node and everything below it."""
    needed_from: int = 0
    """The first position at which some sequence below needs an output."""
    sequences: int = 0
    """Sequences that pass or end here."""
    known: tuple[Path, int] | None = None
    """A computed path through this node, and how far it is of use."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is to be computed, in order."""

    blocks: list[Block]
    paths: list[Path]
    """Of each sequence: the blocks that hold it."""
    shared: list[tuple[int, int]]
    """(sequence, length) of the longest beginnings that `shared_by` sequences or more have in common."""

    @property
    def tokens(self) -> int:
        """Tokens to be computed."""
        return sum(len(block.tokens) for block in self.blocks)


def lay_out(
    sequences: Sequence[Tokens],
    needed_from: Sequence[int],
    *,
    longest_block: int,
    known: Sequence[tuple[Tokens, Path]] = (),
    shared_by: int = 8,
) -> Layout:
    """Blocks that hold every distinct token of `sequences` (sorted, distinct, none empty) about once.

    `needed_from[i]` is the first position of sequence i whose output is needed: tokens from there on are computed even
    where `known` paths (token sequences whose keys and values are kept) hold them. No block has more than
    `longest_block` tokens.
    """
    root = _build(sequences, needed_from)
    for tokens, path in sorted(known, key=lambda entry: -len(entry[0])):
        _mark_known(root, sequences, needed_from, tokens, path)
    work = _Layouter(sequences, longest_block)
    work.lay_children(root, Path())
    return Layout(work.blocks, [work.paths[index] for index in range(len(sequences))], _shared(root, shared_by))


def lay_out_grid(
    sequences: Sequence[Tokens], needed_from: Sequence[int], *, grid: int, known: Sequence[tuple[Tokens, Path]] = ()
) -> Layout:
    """Blocks cut at multiples of `grid` positions, whatever the sequences have in common, each to be run alone.

    What a token is computed with then depends on nothing but the tokens before it: where whole blocks are the same they
    are shared, a sequence's last one is its own. `known` paths are of such blocks too; the rest as for `lay_out`.
    """
    work = _Layouter(sequences, grid)
    whole: dict[Tokens, Path] = {(): Path()}
    old = {tokens[:end]: path.until(end) for tokens, path in known for end in range(grid, path.end + 1, grid)}
    floors: dict[Tokens, int] = {}
    for tokens, needed in zip(sequences, needed_from, strict=True):
        for end in range(grid, len(tokens) + 1, grid):
            floors[tokens[:end]] = min(needed, floors.get(tokens[:end], needed))
    for index, tokens in enumerate(sequences):
        path = Path()
        for end in range(grid, len(tokens) + 1, grid):
            if tokens[:end] in whole:
                path = whole[tokens[:end]]
            elif tokens[:end] in old and end <= floors[tokens[:end]]:
                path = old[tokens[:end]]
            else:
                path = whole[tokens[:end]] = work.add_blocks(tokens[:end], path)
        work.paths[index] = work.add_blocks(tokens, path)
    return Layout(work.blocks, [work.paths[index] for index in range(len(sequences))], [])


def pack(
    blocks: Iterable[Block], cost: Callable[[Block], tuple[float, ...]], most: tuple[float, ...]
) -> Iterator[list[Block]]:
    """Batches of blocks, in order, whose costs add up to no more than `most` in any respect; at least one in each."""
    batch: list[Block] = []
    used = (0.0,) * len(most)
    for block in blocks:
        own = cost(block)
        after = tuple(map(sum, zip(used, own, strict=True)))
        if batch and any(a > b for a, b in zip(after, most, strict=True)):
            yield batch
            batch, after = [], own
        batch.append(block)
        used = after
    if batch:
        yield batch


def _build(sequences: Sequence[Tokens], needed_from: Sequence[int]) -> _Node:
    """The tree, with sizes; sorted sequences are added along its last path only."""
    root = _Node(0, 0, 0)
    last_path, order = [root], [root]
    previous: Tokens = ()
    for index, tokens in enumerate(sequences):
        shared = common_prefix(previous, tokens) if index else 0
        left = root
        while last_path[-1].end > shared:
            left = last_path.pop()
        if last_path[-1].end < shared:  # `left` has to be cut in two
            upper = _Node(left.start, shared, left.sequence, [left])
            last_path[-1].children[-1] = upper
            left.start = shared
            last_path.append(upper)
            order.append(upper)
        leaf = _Node(shared, len(tokens), index, ending=index)
        last_path[-1].children.append(leaf)
        last_path.append(leaf)
        order.append(leaf)
        previous = tokens
    for node in sorted(order, key=lambda node: -node.end):  # children before their parents
        node.size = node.end - node.start + sum(child.size for child in node.children)
        node.sequences = (node.ending is not None) + sum(child.sequences for child in node.children)
        floors = [child.needed_from for child in node.children]
        node.needed_from = min([*floors, needed_from[node.ending]] if node.ending is not None else floors, default=0)
    return root


def _mark_known(
    root: _Node, sequences: Sequence[Tokens], needed_from: Sequence[int], tokens: Tokens, path: Path
) -> None:
    """Let the nodes along `tokens` know that `path` holds them, as far as none of their outputs is needed."""
    node, walked, limit = root, list[_Node](), path.end
    while True:
        if node.ending is not None:
            limit = min(limit, needed_from[node.ending])
        following, same = None, 0
        for child in node.children:
            spelt = sequences[child.sequence]
            if child.start < path.end and spelt[child.start] == tokens[child.start]:
                own = spelt[child.start : child.end]
                following, same = child, common_prefix(own, tokens[child.start : child.end])
            elif child.needed_from < child.start:
                limit = min(limit, child.needed_from)
        if following is None:
            break
        walked.append(following)
        if following.start + same < following.end:
            limit = min(limit, following.start + same, following.needed_from)
            break
        node = following
    for node in walked:
        if node.known is None and node.start < limit:
            node.known = (path, limit)


def _shared(root: _Node, shared_by: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    waiting = [child for child in root.children if child.sequences >= shared_by]
    while waiting:
        node = waiting.pop()
        below = [child for child in node.children if child.sequences >= shared_by]
        waiting += below
        if not below:
            found.append((node.sequence, node.end))
    return found


class _Layouter:
    """Walks the tree, heaviest path first."""

    def __init__(self, sequences: Sequence[Tokens], longest_block: int) -> None:
        self._sequences = sequences
        self._longest_block = longest_block
        self.blocks: list[Block] = []
        self.paths: dict[int, Path] = {}

    def lay_children(self, node: _Node, path: Path) -> None:
        for child in node.children:
            self._lay(child, path)

    def _lay(self, node: _Node, path: Path) -> None:
        """Lay out `node` and everything below it; `path` ends where the node starts."""
        if node.known:
            self._follow_known(node, *node.known)
        else:
            self._lay_heavy(node, self._without_scraps(path, node.size))

    def _follow_known(self, node: _Node, path: Path, end: int) -> None:
        """Use the computed `path` up to `end`, and lay out what branches off it or goes on after it."""
        while node.end <= end:
            if node.ending is not None:
                self.paths[node.ending] = path.until(node.end)
            following = None
            for child in node.children:
                if following is None and child.known and child.known[0] is path and child.start < end:
                    following = child
                else:
                    self._lay(child, path.until(child.start))
            if following is None:
                return
            node = following
        self._lay_heavy(node, path.until(end))

    def _lay_heavy(self, node: _Node, path: Path) -> None:
        chain = [node]
        while chain[-1].children:
            chain.append(max(chain[-1].children, key=lambda child: child.size))
        path = self.add_blocks(self._sequences[chain[-1].sequence], path)
        for upper, following in zip(chain, [*chain[1:], None], strict=True):
            if upper.ending is not None:
                self.paths[upper.ending] = path.until(upper.end)
                path.until(upper.end).sources[-1].block.sequences += 1
            for child in upper.children:
                if child is not following:
                    self._lay(child, path.until(child.start))

    def add_blocks(self, tokens: Tokens, path: Path) -> Path:
        for start in range(path.end, len(tokens), self._longest_block):
            block = Block(start, tokens[start : start + self._longest_block], path)
            for source in path.sources:
                source.block.users += 1
                source.block.reach = max(source.block.reach, source.length)
            self.blocks.append(block)
            path = path.then(block)
        return path

    @staticmethod
    def _without_scraps(path: Path, size: int) -> Path:
        """`path` without last sources that together hold so few tokens that a branch of `size` computes them itself."""
        end = path.end
        while path.sources and end - path.sources[-1].block.start <= DUPLICATED_SHARE * size:
            path = path.until(path.sources[-1].block.start)
        return path

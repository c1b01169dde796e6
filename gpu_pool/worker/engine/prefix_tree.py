"""The tree of a chunk's token sequences, and how far what earlier chunks have left (known paths) is of use in it.

A known path holds the keys and values of its tokens, but not their outputs: logits and hidden states are gone. So a
sequence may look back at the path only as far as it needs no output of it, and computes the rest, even tokens that the
path holds. Of three sequences and the known path p0 … p7 x y, which is of an earlier chunk,

    position       0   1   2   3   4   5   6   7   8   9   10      needs outputs   goes along
    known path     p0  p1  p2  p3  p4  p5  p6  p7  x   y           from            the path until
    A              ·   ·   ·   ·   ·   ·   ·   ·   ·   y   w       9               9, where it needs its own outputs
    B              ·   ·   ·   ·   ·   ·   ·   p7  z               7               8, where it leaves it
    C              ·   ·   ·   p3  q                               3               4, the same

(the dots are known, the others are computed) A uses nine tokens of the path. B and C leave it before and compute one
token again, each for itself: the output of p7 says how likely z is. That is found by `mark_known`: it walks along the
path, which can be used until 9 at most, and meets on its way those that leave it, (8, 7) and (4, 3).

How much of it to use is a choice (`_useful`). Who leaves the used part pays for itself, from its first needed output to
where it leaves; the part that is not used is computed once for all who pass there. To use n tokens spares n and costs
what those pay who leave before n: here 9 - 1 - 1 for all of it. But had B twenty siblings that leave at 8 and need
outputs from 3 on, each would pay 5: then three tokens are used, and p3 … p7 are computed once.

Pure Python, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gpu_pool.worker.engine.blocks import BlockPath, Tokens, common_prefix


@dataclass(eq=False, slots=True)
class Node:
    """A piece of the tree without a branch: positions `start` to `end` of `sequence`, and what follows it."""

    start: int
    end: int
    sequence: int
    children: list[Node] = field(default_factory=list)
    ending: int | None = None
    """The sequence that ends here."""
    size: int = 0
    """Tokens of the node and everything below it."""
    needed_from: int = 0
    """The first position at which some sequence below needs an output."""
    sequences: int = 0
    """Sequences that pass or end here."""
    known: tuple[BlockPath, int] | None = None
    """A computed path through this node, and how far it is of use."""


def build_tree(sequences: Sequence[Tokens], needed_from: Sequence[int]) -> Node:
    """The tree, with sizes; sorted sequences are added along its last path only."""
    root = Node(0, 0, 0)
    last_path, order = [root], [root]
    previous: Tokens = ()
    for index, tokens in enumerate(sequences):
        shared = common_prefix(previous, tokens) if index else 0
        left = root
        while last_path[-1].end > shared:
            left = last_path.pop()
        if last_path[-1].end < shared:  # `left` has to be cut in two
            upper = Node(left.start, shared, left.sequence, [left])
            last_path[-1].children[-1] = upper
            left.start = shared
            last_path.append(upper)
            order.append(upper)
        leaf = Node(shared, len(tokens), index, ending=index)
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


def mark_known(
    root: Node, sequences: Sequence[Tokens], needed_from: Sequence[int], tokens: Tokens, path: BlockPath
) -> None:
    """Let the nodes along `tokens` know that `path` holds them, as far as it is of use."""
    node, walked, end = root, list[Node](), path.end
    leaving: list[tuple[int, int]] = []
    while True:
        if node.ending is not None and node.known is None:
            leaving.append((node.end, needed_from[node.ending]))
        following, same = None, 0
        for child in node.children:
            spelt = sequences[child.sequence]
            if child.start < path.end and spelt[child.start] == tokens[child.start]:
                own = spelt[child.start : child.end]
                following, same = child, common_prefix(own, tokens[child.start : child.end])
            elif child.needed_from < child.start and node.known is None:
                leaving.append((child.start, child.needed_from))
        if following is None:
            break
        walked.append(following)
        if following.start + same < following.end:
            end = min(end, following.start + same, following.needed_from)
            break
        node = following
    end = _useful(min(end, node.end) if following is None else end, leaving)
    for node in walked:
        if node.known is None and node.start < end:
            node.known = (path, end)


def _useful(end: int, leaving: Sequence[tuple[int, int]]) -> int:
    """How many first tokens of a known path to use, `end` at most, so that the fewest are computed again.

    `leaving` are (position at which it leaves the path, first position before that of which it needs the output).
    What leaves the used part computes from its first needed output on itself, a single token as a rule; what leaves
    later needs all of its outputs from the rest, which is computed again once for all.
    """
    useful, fewest = 0, math.inf
    used, again = end, sum(start - needed for start, needed in leaving)
    for start, needed in [*sorted(leaving, reverse=True), (0, 0)]:
        if start <= used and again - used <= fewest:
            useful, fewest = used, again - used
        used, again = min(used, needed), again - (start - needed)
    return useful


def shared_beginnings(root: Node, shared_by: int) -> list[tuple[int, int]]:
    """(sequence, length) of the longest beginnings that `shared_by` sequences or more have in common."""
    found: list[tuple[int, int]] = []
    waiting = [child for child in root.children if child.sequences >= shared_by]
    while waiting:
        node = waiting.pop()
        below = [child for child in node.children if child.sequences >= shared_by]
        waiting += below
        if not below:
            found.append((node.sequence, node.end))
    return found

"""In which order units are asked: along the token trie of what the model reads, at each node the largest part last.

Units then share with the one before them whatever they share with any before that, as in sorted order. What is cut off
here and computed later goes on from that one: it needs the outputs of tokens there at which it leaves. In this order
those are few, at most log2(tokens) for a cut, for a part that comes after another one is the larger, so that they at
least double from each to the next one above it. In sorted order they may be as many as there are units.

    0 ─ 1 ─ 2 ─ 3 ─ 4 ─ …   a line of tokens     sorted:         a c e … line … f d b
    a ╯ b ╯ c ╯ d ╯ e ╯     leaves it anywhere   largest last:   a b c d e f … line
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpu_pool.token_sequences import TOKEN_BYTES, common_prefix

if TYPE_CHECKING:
    from gpu_pool.evaluator.requests import Unit


@dataclass(slots=True, eq=False)
class _Node:
    """A piece of the trie without a branch."""

    end: int
    """Tokens from the root on."""
    children: list[_Node] = field(default_factory=list["_Node"])
    units: list[Unit] = field(default_factory=list["Unit"])
    """Those that end here."""
    size: int = 0
    """Tokens of everything below it."""
    comes_first: bool = False
    """It was begun before."""


def in_trie_order(units: Iterable[Unit], after: bytes = b"") -> list[Unit]:
    """The units: those that read the same side by side, and what others begin with before them.

    `after` are tokens (`token_bytes`) that were read last: what shares the most with them comes first, however large.
    """
    ordered: list[Unit] = []
    waiting = [_build(units, after)]
    while waiting:
        node = waiting.pop()
        ordered += node.units
        largest = max(node.children, key=lambda child: child.size + child.end, default=None)
        in_turn = sorted(node.children, key=lambda child: (not child.comes_first, child is largest))
        waiting += reversed(in_turn)  # what comes last is taken first
    return ordered


def _build(units: Iterable[Unit], after: bytes) -> _Node:
    """The root of the trie: sorted units are added along its last path only."""
    root = _Node(0)
    last_path, nodes = [root], [root]
    previous = b""
    keyed: list[tuple[tuple[bytes, bytes], Unit | None]] = [(unit.order, unit) for unit in units]
    if after:
        keyed.append(((np.frombuffer(after, "<u4").astype(">u4").tobytes(), b""), None))
    for (read, _), unit in sorted(keyed, key=lambda keyed: keyed[0]):
        shared, end = common_prefix(previous, read), len(read) // TOKEN_BYTES
        left = root
        while last_path[-1].end > shared:
            left = last_path.pop()
        if last_path[-1].end < shared:  # `left` has to be cut in two
            upper = _Node(shared, [left], comes_first=left.comes_first)
            last_path[-1].children[-1] = upper
            last_path.append(upper)
            nodes.append(upper)
        if shared < end:
            leaf = _Node(end)
            last_path[-1].children.append(leaf)
            last_path.append(leaf)
            nodes.append(leaf)
        if unit is not None:
            last_path[-1].units.append(unit)
        else:
            for node in last_path:
                node.comes_first = True
        previous = read
    for node in sorted(nodes, key=lambda node: -node.end):  # children before their parents
        node.size += sum(child.size + child.end - node.end for child in node.children)
    return root

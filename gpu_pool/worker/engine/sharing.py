"""Which first tokens of prompts stay in the tree's blocks while they are continued, and which are copied into slots.

A block that many rows look back at is read once a step for all of them. But each block is a call of its own in every
layer, so one that saves too little is copied behind what its rows share instead. Slots are as long as the longest row:
a few prompts that are much longer than the others stay in their blocks whole. Pure Python, without torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from gpu_pool.worker.engine.blocks import Block, BlockPath

LEAST_SAVED = 512
"""Tokens of keys and values that a block must save, all its rows together, to be attended to apart."""
OUTLYING = 4
"""Times the median of the tokens in slots: a prompt with more makes all slots longer."""
MOST_OUTLIERS = 8
"""Prompts of a chunk that stay in their blocks for being so long."""


def shared_lengths(paths: Sequence[BlockPath], counts: Sequence[int]) -> list[int]:
    """How many first tokens of each path to leave in its blocks, where `counts` prompts follow each.

    Within a block they end at one of few places, so that the rows between two of them see the same tokens.
    """
    shared = _worth_sharing(paths, counts)
    own = [path.end - length for path, length in zip(paths, shared, strict=True)]
    usual = max(LEAST_SAVED, OUTLYING * statistics.median(own)) if own else 0
    for index in sorted(range(len(own)), key=lambda index: -own[index])[:MOST_OUTLIERS]:
        if own[index] > usual:
            shared[index] = paths[index].end
    return shared


def _worth_sharing(paths: Sequence[BlockPath], counts: Sequence[int]) -> list[int]:
    shared = [0] * len(paths)
    groups = [(0, list(range(len(paths))))]
    while groups:
        depth, members = groups.pop()
        for block, users in _by_block(paths, depth, members).items():
            lengths = {user: paths[user].sources[depth].length for user in users}
            ends = _worthwhile_ends([(lengths[user], counts[user]) for user in users])
            going_on: list[int] = []
            for user in users:
                end = max((end for end in ends if end <= lengths[user]), default=0)
                if end:
                    shared[user] = block.start + end
                if end == lengths[user]:
                    going_on.append(user)
            if going_on:
                groups.append((depth + 1, going_on))
    return shared


def _by_block(paths: Sequence[BlockPath], depth: int, members: Iterable[int]) -> dict[Block, list[int]]:
    users: dict[Block, list[int]] = {}
    for member in members:
        if depth < len(paths[member].sources):
            users.setdefault(paths[member].sources[depth].block, []).append(member)
    return users


def _worthwhile_ends(users: list[tuple[int, int]]) -> list[int]:
    """Where to end what stays of a block, of the (length, count) of those who look at it."""
    rows = sum(count for _, count in users)
    ends = [0]
    for length, count in sorted(users):
        if (length - ends[-1]) * (rows - 1) >= LEAST_SAVED:
            ends.append(length)
        rows -= count
    return ends[1:]

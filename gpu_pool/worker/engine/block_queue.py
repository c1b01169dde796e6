# pyright: basic
"""The blocks that wait to be computed: those that share the next forward pass, and what becomes of them in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from gpu_pool.worker.engine.batching import run_halving
from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.limits import Limits
from gpu_pool.worker.engine.packed import attempting, finish
from gpu_pool.worker.engine.token_tree import Room, pack


class BlockQueue:
    """Blocks in the order in which they are computed."""

    def __init__(self) -> None:
        self._blocks: deque[Block] = deque()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, blocks: Iterable[Block]) -> None:
        """Compute these when all others have been."""
        self._blocks.extend(blocks)

    def next_batch(self, cost: Callable[[Block], Room], room: Room, *, deterministic: bool) -> list[Block]:
        """The first ones, as many as there is room for, at least one of those that wait; they still do."""
        return next(pack(self._blocks, cost, room, deterministic=deterministic))

    def run(self, batch: list[Block], compute: Callable[[list[Block]], None], limits: Limits) -> None:
        """Let `compute` run a batch that is next, in halves where memory does not suffice, which `limits` are told.

        What has been computed waits no more, however the rest ends.

        Raises:
            torch.OutOfMemoryError: a single block needs more memory than there is.
        """

        def run(blocks: list[Block]) -> list[None]:
            with attempting(blocks):
                compute(blocks)
            finish(blocks)
            for _ in blocks:  # the first ones of those that wait: halves come in order
                self._blocks.popleft()
            return []

        run_halving(run, batch, lambda blocks: limits.shrink(sum(len(block.tokens) for block in blocks)))

    def shrink_next(self, limits: Limits) -> None:
        """The next block was too much alone: those laid out from now on are smaller."""
        limits.shrink_block(len(self._blocks[0].tokens))

    def let_go(self) -> None:
        """Nothing of this will be computed."""
        finish(self._blocks)
        self._blocks.clear()

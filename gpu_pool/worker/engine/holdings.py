# pyright: basic
"""The blocks that prompts need on their way, and the memory that these take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gpu_pool.worker.engine.blocks import Block, BlockPath
from gpu_pool.worker.engine.packed import hold, kept_bytes, release


class Holdings:
    """Paths that somebody holds. Blocks that were computed before anyone held them are the prefix cache's affair."""

    def __init__(self) -> None:
        self._holders: Counter[Block] = Counter()
        self._bytes: dict[Block, int] = {}
        """Of those blocks that have been computed meanwhile."""

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(self._bytes.values())

    def hold(self, path: BlockPath) -> None:
        """Keep what `path` holds, from when it is computed until it is released as often."""
        hold(path)
        self._holders.update(block for block, _ in path.sources)

    def add_computed(self, blocks: Iterable[Block]) -> None:
        """The keys and values of these are there now."""
        self._bytes |= {block: kept_bytes(block) for block in blocks if block in self._holders}

    def release(self, path: BlockPath) -> None:
        """One holder less of what `path` holds."""
        release(path.sources)
        for block, _ in path.sources:
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                self._bytes.pop(block, None)

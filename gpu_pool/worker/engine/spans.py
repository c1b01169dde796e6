"""What attends to what in a batch of blocks, as spans: neighbouring queries that look at the same keys.

Every block attends to itself, causally, and to the first tokens of the blocks it follows, in this batch or kept from
earlier ones. Blocks that follow each other in the batch and look back at the same tokens are one span.

Pure Python, without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gpu_pool.worker.engine.blocks import Block, Source


@dataclass(slots=True)
class Span:
    """Tokens start to end of the batch as queries, which look at `length` keys: of the batch itself, or of a block."""

    start: int
    end: int
    first_position: int
    """The lowest position of the queries in their sequences."""
    last_position: int
    """The highest one."""
    key_start: int
    """Where the keys begin in the batch, or in `block`."""
    length: int
    key_position: int
    """The first key's position in its sequence; the others follow."""
    block: Block | None = None
    """Of an earlier batch, if its kept keys are meant."""

    @property
    def queries(self) -> int:
        return self.end - self.start

    @property
    def distance(self) -> int:
        """How far apart the last query and the first key are."""
        return self.last_position - self.key_position


def spans_by_depth(blocks: Sequence[Block], starts: Mapping[Block, int]) -> list[list[Span]]:
    """First each block's attention to itself, which is causal; then what is looked back at, by its place in the paths.

    `starts` says where in the batch each of its blocks begins. Spans of one list have no query in common, so that they
    may be computed side by side; they are in the order of their queries.
    """
    own: list[Span] = []
    depths: list[list[Span]] = [own]
    runs: dict[Source, Span] = {}
    for block in blocks:
        start, size, first = starts[block], len(block.tokens), block.start
        end, last = start + size, first + size - 1
        own.append(Span(start, end, first, last, start, size, first))
        for depth, source in enumerate(block.path.sources, 1):
            run = runs.get(source)
            if run is not None and run.end == start:
                run.end = end
                run.first_position = min(run.first_position, first)
                run.last_position = max(run.last_position, last)
                continue
            kept = None if source.block in starts else source.block
            key_start = starts.get(source.block, 0)
            run = Span(start, end, first, last, key_start, source.length, source.block.start, kept)
            runs[source] = run
            if depth == len(depths):
                depths.append([])
            depths[depth].append(run)
    return depths


def in_window(spans: Iterable[Span], window: int) -> list[Span]:
    """The same without keys that are `window` positions or more before every query of their span."""
    seen: list[Span] = []
    for span in spans:
        hidden = max(span.first_position - window + 1 - span.key_position, 0)
        if not hidden:
            seen.append(span)
        elif hidden < span.length:
            seen.append(
                replace(
                    span,
                    key_start=span.key_start + hidden,
                    length=span.length - hidden,
                    key_position=span.key_position + hidden,
                )
            )
    return seen

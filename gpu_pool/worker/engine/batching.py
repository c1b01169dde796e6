# pyright: basic
"""Cutting work into forward passes, and into smaller ones when memory runs out after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from gpu_pool.worker.engine.limits import Limits
from gpu_pool.worker.engine.shortage import is_out_of_memory

T = TypeVar("T")
R = TypeVar("R")

_PADDING_SHARE = 0.2
"""Most of a row that may be padding where another batch would be worth its while."""


def run_batches(
    run: Callable[[list[T]], list[R]],
    items: Sequence[T],
    fits: Callable[[list[T], T], bool],
    on_shortage: Callable[[list[T]], None] = lambda _: None,
) -> Iterator[R]:
    """What `run` makes of all `items`: of as many at once as `fits` lets in, of fewer where memory does not suffice.

    `on_shortage` is told what was too much; `fits`, which is asked as the work goes on, may take it into account.

    Raises:
        torch.OutOfMemoryError: a single item needs more memory than there is.
    """
    for batch in _greedy_batches(items, fits):
        yield from run_halving(run, batch, on_shortage)


def is_worthwhile(limits: Limits, count: int, width: int, length: int, batch_size: int | None) -> bool:
    """Whether `count` rows padded to `width` tokens should take one of `length` in: at most `batch_size`, if given."""
    if batch_size and count >= batch_size:
        return False
    padded = length < (1 - _PADDING_SHARE) * width and count * width >= limits.worthwhile_tokens
    return not padded and (count + 1) * width <= limits.scored_tokens


def _greedy_batches(items: Sequence[T], fits: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Cut `items` into runs: each takes the next item as long as `fits(run, item)`; a run has at least one."""
    batch: list[T] = []
    for item in items:
        if batch and not fits(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def run_halving(
    run: Callable[[list[T]], list[R]], items: list[T], on_shortage: Callable[[list[T]], None] = lambda _: None
) -> list[R]:
    """`run(items)`, or in halves when the GPU's memory does not suffice; `on_shortage` is told what was too much.

    It is not told of a single item: no bound makes that smaller.

    Raises:
        torch.OutOfMemoryError: a single item needs more memory than there is.
    """
    try:
        return run(items)
    except RuntimeError as error:
        if len(items) == 1 or not is_out_of_memory(error):
            raise
        on_shortage(items)
    torch.cuda.empty_cache()  # outside the handler, whose traceback holds the failed attempt's tensors
    middle = len(items) // 2
    return run_halving(run, items[:middle], on_shortage) + run_halving(run, items[middle:], on_shortage)

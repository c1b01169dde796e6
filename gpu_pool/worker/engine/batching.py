# pyright: basic
"""What one forward pass may hold: batches by size and memory, smaller ones when memory runs out after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Cancelled(Exception):
    """Nobody waits for this chunk any more."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one batch may hold on a kind of device."""

    scored_tokens: int
    """Padded tokens of a forward pass whose logits are scored, where the request leaves the batch size to us."""
    worthwhile_tokens: int
    """Padded tokens from which on a forward pass uses the device well: a larger one should not grow by padding."""
    generated_tokens: int
    """Padded tokens, prompt and continuation, that are held while generating; likewise."""
    generated_rows: int
    """Sequences generated at once; likewise."""
    logits_bytes: int
    """Memory of the logits of one forward pass, in fp32; always."""


CPU_LIMITS = Limits(
    scored_tokens=2048, worthwhile_tokens=128, generated_tokens=8192, generated_rows=32, logits_bytes=1 << 30
)
CUDA_LIMITS = Limits(
    scored_tokens=16384, worthwhile_tokens=4096, generated_tokens=65536, generated_rows=128, logits_bytes=4 << 30
)
PADDING_SHARE = 0.2
"""Most of a row that may be padding where another batch would be worth its while."""


def greedy_batches(items: Sequence[T], fits: Callable[[list[T], T], bool]) -> Iterator[list[T]]:
    """Cut `items` into runs: each takes the next item as long as `fits(run, item)`; a run has at least one."""
    batch: list[T] = []
    for item in items:
        if batch and not fits(batch, item):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def run_halving(run: Callable[[list[T]], list[R]], items: list[T]) -> list[R]:
    """`run(items)`, or in halves when the GPU's memory does not suffice.

    Raises:
        torch.OutOfMemoryError: a single item needs more memory than there is.
    """
    try:
        return run(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise
    torch.cuda.empty_cache()  # outside the handler, whose traceback holds the failed attempt's tensors
    middle = len(items) // 2
    return run_halving(run, items[:middle]) + run_halving(run, items[middle:])

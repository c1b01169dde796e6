# pyright: basic
"""Scores continuations along the tree of their token sequences: each distinct token is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from gpu_pool.worker.engine.batching import run_halving
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.packed import finish, packed_attention_in, run_blocks
from gpu_pool.worker.engine.prefix_cache import lay_out_for, release_all
from gpu_pool.worker.engine.rows import Answer, Row
from gpu_pool.worker.engine.token_scores import token_log_probs
from gpu_pool.worker.engine.token_tree import Block, Layout, pack


@dataclass(frozen=True, slots=True)
class _Target:
    """A token whose probability is asked for after a block's token `index`."""

    index: int
    token: int
    request: int


def score_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    batch_size: int | None,
    should_stop: Callable[[], bool],
    *,
    deterministic: bool = False,
) -> dict[int, Answer]:
    """The answer of each request; `rows` are distinct and `should_stop` is asked before each forward pass.

    `deterministic`: each block of a fixed grid is run alone, so that the bits of an answer depend on its request only.
    Where even one block is too much for the GPU's memory, all is laid out anew in smaller ones.

    Raises:
        Cancelled: `should_stop` said so.
        torch.OutOfMemoryError: even the smallest blocks are too much.
    """
    rows = sorted(rows, key=lambda row: row.tokens)
    largest = max(len(row.tokens) for row in rows)
    while True:
        largest = min(largest, loaded.limits.scored_tokens)
        try:
            return _score_once(loaded, rows, batch_size, should_stop, deterministic=deterministic)
        except torch.OutOfMemoryError:
            if deterministic or not loaded.limits.shrink_block(largest):
                raise
        torch.cuda.empty_cache()


def _score_once(
    loaded: LoadedModel,
    rows: Sequence[Row],
    batch_size: int | None,
    should_stop: Callable[[], bool],
    *,
    deterministic: bool,
) -> dict[int, Answer]:
    """The answers for sorted `rows`."""
    sequences = [row.tokens for row in rows]
    cache = loaded.grid_cache if deterministic else loaded.prefix_cache
    needed_from = [row.first_scored for row in rows]
    layout = lay_out_for(loaded, sequences, needed_from, cache.find(sequences), deterministic=deterministic)
    targets: dict[Block, list[_Target]] = {}
    for row, path in zip(rows, layout.paths, strict=True):
        for request, continuation in row.targets:
            places = path.locate(len(row.tokens) - len(continuation), len(row.tokens))
            for (block, index), token in zip(places, continuation, strict=True):
                targets.setdefault(block, []).append(_Target(index, token, request))
    sums = _Sums()
    unfinished = set(layout.blocks)
    assert targets.keys() <= unfinished, "a scored token is in a block that is not computed"

    def run(batch: list[Block]) -> list[None]:
        if should_stop():
            raise Cancelled
        _score_batch(loaded, batch, targets, sums, whole=deterministic)
        finish(batch)
        unfinished.difference_update(batch)
        return []

    reserved = cache.reserve(layout, sequences)
    try:
        with packed_attention_in(loaded.model):
            alone = ([block] for block in layout.blocks)
            for batch in alone if deterministic else _batches(loaded, layout, batch_size, targets):
                run_halving(run, batch, lambda blocks: loaded.limits.shrink(sum(len(b.tokens) for b in blocks)))
    except BaseException:
        finish(unfinished)
        release_all(reserved)
        raise
    cache.keep(reserved)
    return sums.answers()


def _batches(
    loaded: LoadedModel, layout: Layout, batch_size: int | None, targets: dict[Block, list[_Target]]
) -> Iterator[list[Block]]:
    """Blocks of one forward pass: by its tokens, its logits' memory, and the sequences asked for."""
    logits = loaded.limits.logits(loaded.vocabulary)

    def cost(block: Block) -> tuple[float, ...]:
        positions = len({target.index for target in targets.get(block, ())})
        return len(block.tokens), positions, block.sequences

    return pack(layout.blocks, cost, (loaded.limits.scored_tokens, logits, batch_size or math.inf))


class _Sums:
    """What is known of each request's answer so far: its tokens may be scored in several batches."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._greedy: dict[int, bool] = {}

    def add(self, targets: Sequence[_Target], values: Sequence[float], greedy: Sequence[bool]) -> None:
        for target, value, is_greedy in zip(targets, values, greedy, strict=True):
            self._values[target.request] = self._values.get(target.request, 0.0) + value
            self._greedy[target.request] = self._greedy.get(target.request, True) and is_greedy

    def answers(self) -> dict[int, Answer]:
        return {request: (value, self._greedy[request]) for request, value in self._values.items()}


def _score_batch(
    loaded: LoadedModel, batch: Sequence[Block], targets: dict[Block, list[_Target]], sums: _Sums, *, whole: bool
) -> None:
    """One forward pass over `batch`; `whole`: with the logits of all tokens of a block where some are scored."""
    wanted: dict[tuple[Block, int], int] = {}
    for block in batch:
        indexes = {target.index for target in targets.get(block, ())}
        for index in range(len(block.tokens)) if whole and indexes else sorted(indexes):
            wanted[block, index] = len(wanted)
    logits = run_blocks(loaded.model, batch, list(wanted))
    asked = [(target, wanted[block, target.index]) for block in batch for target in targets.get(block, ())]
    if asked:
        asked.sort(key=lambda pair: pair[1])
        rows = torch.tensor([row for _, row in asked], device=logits.device)
        tokens = torch.tensor([target.token for target, _ in asked], device=logits.device)
        values, greedy = token_log_probs(logits, rows, tokens, loaded.softmax_dtype)
        sums.add([target for target, _ in asked], values.tolist(), greedy.tolist())

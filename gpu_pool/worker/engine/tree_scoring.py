# pyright: basic
"""Scores continuations along the tree of their token sequences: each distinct token is computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_pool.worker.engine.block_queue import BlockQueue
from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.kept_scores import Score, Scores, find_scores
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.packed import kept_bytes, packed_attention_in, run_blocks
from gpu_pool.worker.engine.prefix_cache import release_all
from gpu_pool.worker.engine.rows import Answer, Row
from gpu_pool.worker.engine.shortage import is_out_of_memory
from gpu_pool.worker.engine.token_scores import Sums, token_log_probs
from gpu_pool.worker.engine.token_tree import Layout, Room, plan
from gpu_pool.worker.engine.transfer import ToHost


@dataclass(eq=False, slots=True)  # not frozen, which would make it three times as slow to make: there is one a token
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

    The next chunk goes on where the last one of `rows` ends.

    `deterministic`: each block of a fixed grid is run alone, so that the bits of an answer depend on its request only.
    Where even one block is too much for the GPU's memory, the cached beginnings are given up, and if that is not
    enough, all is laid out anew in smaller blocks.

    Raises:
        Cancelled: `should_stop` said so.
        torch.OutOfMemoryError: even the smallest blocks are too much.
    """
    last = rows[-1]
    rows = sorted(rows, key=lambda row: row.tokens)
    largest = max(len(row.tokens) for row in rows)
    while True:
        largest = min(largest, loaded.limits.scored_tokens)
        try:
            return _score_once(loaded, rows, last, batch_size, should_stop, deterministic=deterministic)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not len(loaded.prefix_cache) and (deterministic or not loaded.limits.shrink_block(largest)):
                raise
        loaded.prefix_cache.clear()
        torch.cuda.empty_cache()  # outside the handler, whose traceback holds the failed attempt's tensors


def _score_once(
    loaded: LoadedModel,
    rows: Sequence[Row],
    last: Row,
    batch_size: int | None,
    should_stop: Callable[[], bool],
    *,
    deterministic: bool,
) -> dict[int, Answer]:
    """The answers for sorted `rows`, of which the next chunk goes on after `last`."""
    sequences = [row.tokens for row in rows]
    cache = loaded.grid_cache if deterministic else loaded.prefix_cache
    known = cache.find(sequences)
    first_scored = [row.first_scored for row in rows]
    kept = find_scores(sequences, first_scored, [(tokens, scores) for tokens, _, scores in known], cache.grid)
    most, paths = batch_size or math.inf, [(tokens, path) for tokens, path, _ in known]
    layout = plan(sequences, [needed for needed, _ in kept], loaded.room(most), paths, deterministic=deterministic)
    sums = _Sums()
    targets = _find_targets(rows, layout, kept, sums)
    assert targets.keys() <= set(layout.blocks), "a scored token is in a block that is not computed"
    waiting, held = BlockQueue(), list[Block]()
    waiting.add(layout.blocks)

    def compute(batch: list[Block]) -> None:
        if should_stop():
            raise Cancelled
        _score_batch(loaded, batch, targets, sums, whole=deterministic)

    def cost(block: Block) -> Room:
        positions = len({target.index for target in targets.get(block, ())})
        return Room(len(block.tokens), positions, block.sequences, block.reach * loaded.token_bytes)

    reserved = cache.reserve(layout, sequences, rows.index(last), [scores.until(needed + 1) for needed, scores in kept])
    try:
        with packed_attention_in(loaded.model):
            while waiting:
                room = loaded.room(most, max(0, loaded.limits.held_bytes - sum(map(kept_bytes, held))))
                batch = waiting.next_batch(cost, room, deterministic=deterministic)
                waiting.run(batch, compute, loaded.limits)
                held = [block for block in (*held, *batch) if block.users]
        sums.read()
    except BaseException:
        waiting.let_go()
        release_all(reserved)
        raise
    cache.keep(reserved, sums.computed)
    return sums.answers()


def _find_targets(
    rows: Sequence[Row], layout: Layout, kept: Sequence[tuple[int, Scores]], sums: _Sums
) -> dict[Block, list[_Target]]:
    """By block: what is to be computed; the rest is known, and `sums` begin with it.

    `kept`: of each row the first position whose output is needed, and the scores of the tokens up to there.
    """
    targets: dict[Block, list[_Target]] = {}
    for row, path, (needed, scores) in zip(rows, layout.paths, kept, strict=True):
        for request, continuation in row.targets:
            start = len(row.tokens) - len(continuation)
            for score in scores.between(start + 1, needed + 1):
                sums.include(request, *score)
            places = path.locate(max(start, needed), len(row.tokens))
            for (block, index), token in zip(places, continuation[-len(places) :], strict=True):
                targets.setdefault(block, []).append(_Target(index, token, request))
    return targets


class _Sums(Sums):
    """Sums of what was scored in batches of this chunk, and in earlier ones.

    A batch's scores are read when the next one is on its way: a GPU computes while Python adds and plans.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed: dict[Block, dict[tuple[int, int], Score]] = {}
        """Of each block: (index, token that follows there)."""
        self._unread: tuple[Sequence[tuple[Block, _Target]], ToHost] | None = None

    def add(self, targets: Sequence[tuple[Block, _Target]], scores: ToHost) -> None:
        """What a batch computes: log-probabilities of `targets`, and whether they are the most likely tokens."""
        self.read()
        self._unread = targets, scores

    def read(self) -> None:
        """Wait for the batch that was added last."""
        if self._unread is None:
            return
        (targets, scores), self._unread = self._unread, None
        for (block, target), value, is_greedy in zip(targets, *scores.lists(), strict=True):
            self.computed.setdefault(block, {})[target.index, target.token] = value, is_greedy
            self.include(target.request, value, is_greedy)


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
    asked = [(wanted[block, target.index], block, target) for block in batch for target in targets.get(block, ())]
    if asked:
        asked.sort(key=lambda place: place[0])
        rows = np.array([row for row, _, _ in asked])
        tokens = np.array([target.token for _, _, target in asked])
        scores = token_log_probs(logits, rows, tokens, loaded.softmax_dtype)
        sums.add([(block, target) for _, block, target in asked], ToHost(*scores))

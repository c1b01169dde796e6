# pyright: basic
"""Scores continuations in padded batches of whole sequences: for models that the token tree is not written for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from gpu_pool.worker.engine.batching import is_worthwhile, run_batches
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.head import logits_in_pieces
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.rope import forget_earlier_passes, rope_boundary
from gpu_pool.worker.engine.rows import Answer, Row
from gpu_pool.worker.engine.token_scores import TokenScores


def score_rows(
    loaded: LoadedModel,
    rows: Sequence[Row],
    batch_size: int | None,
    should_stop: Callable[[], bool],
    *,
    deterministic: bool = False,
) -> dict[int, Answer]:
    """The answer of each request; `rows` are distinct and `should_stop` is asked before each forward pass.

    `deterministic`: pieces of a row's logits do not depend on this worker's memory.

    Raises:
        Cancelled: `should_stop` said so.
    """
    rows = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))  # longest first: memory runs out early

    most_positions = loaded.limits.scored_positions(loaded.vocabulary, deterministic=deterministic)

    def run(batch: list[Row]) -> list[tuple[int, Answer]]:
        if should_stop():
            raise Cancelled
        forget_earlier_passes(loaded)
        return _score_rows(loaded, batch, most_positions)

    def on_shortage(batch: list[Row]) -> None:
        loaded.limits.shrink(len(batch) * len(batch[0].tokens))

    return dict(run_batches(run, rows, _fits(loaded, batch_size, most_positions), on_shortage))


def _fits(loaded: LoadedModel, batch_size: int | None, most_positions: int) -> Callable[[list[Row], Row], bool]:
    """Whether one more row, none longer than the first, leaves the others' answers alone and fits the requested size,
    ours, and the logits' memory."""
    boundary = rope_boundary(loaded) or loaded.max_length

    def fits(batch: list[Row], row: Row) -> bool:
        width = len(batch[0].tokens)
        if not loaded.scoring_company.allows(width, len(row.tokens)):
            return False
        if width > boundary and len(row.tokens) != width:
            return False
        if _scored_positions(loaded, [*batch, row]) > most_positions:
            return False
        return is_worthwhile(loaded.limits, len(batch), width, len(row.tokens), batch_size)

    return fits


def _scored_positions(loaded: LoadedModel, rows: Sequence[Row]) -> int:
    """Positions of `rows`, none longer than the first, whose logits are computed together."""
    start = min(row.first_scored for row in rows) if loaded.narrows_logits else 0
    return len(rows) * (len(rows[0].tokens) - start)


@torch.inference_mode()
def _score_rows(loaded: LoadedModel, rows: list[Row], most_positions: int) -> list[tuple[int, Answer]]:
    """One forward pass: (index of the request, answer) for all targets of `rows`."""
    if len(rows) == 1 and _scored_positions(loaded, rows) > most_positions and loaded.layers is not None:
        return _score_in_pieces(loaded, rows[0], most_positions)
    wanted = sorted({position for row in rows for position in range(row.first_scored, len(row.tokens))})
    column = {position: index for index, position in enumerate(wanted)}
    ids = pad_right([row.tokens for row in rows], loaded.device)
    logits = loaded.logits(ids, torch.tensor(wanted, device=loaded.device))
    scores = TokenScores(loaded.softmax_dtype)
    for row, row_logits in zip(rows, logits, strict=True):
        scored = row_logits[column[row.first_scored] : column[len(row.tokens) - 1] + 1]
        scores.add(scored, _asked(row, row.first_scored, len(row.tokens)))
    return list(scores.answers().items())


def _score_in_pieces(loaded: LoadedModel, row: Row, most_positions: int) -> list[tuple[int, Answer]]:
    """The same for a row with more logits than there is room for: some of them after the others."""
    positions = range(row.first_scored, len(row.tokens), most_positions)
    forward = partial(loaded.all_logits, pad_right([row.tokens], loaded.device))
    scores = TokenScores(loaded.softmax_dtype)
    for start, logits in zip(positions, logits_in_pieces(loaded.layers, forward, positions), strict=True):
        scores.add(logits[0], _asked(row, start, start + logits.shape[1]))
    return list(scores.answers().items())


def _asked(row: Row, start: int, end: int) -> list[tuple[int, int, int]]:
    """(position from `start` on, token, request) of all tokens that the row's positions before `end` predict."""
    return [
        (position - start, token, index)
        for index, continuation in row.targets
        for position, token in enumerate(continuation, len(row.tokens) - len(continuation))
        if start <= position < end
    ]

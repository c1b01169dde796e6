# pyright: basic
"""Scores continuations in padded batches of whole sequences: for models that the token tree is not written for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from gpu_pool.worker.engine.batching import is_worthwhile, run_batches
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.routes import rope_boundary
from gpu_pool.worker.engine.rows import Answer, Row


def score_rows(
    loaded: LoadedModel, rows: Sequence[Row], batch_size: int | None, should_stop: Callable[[], bool]
) -> dict[int, Answer]:
    """The answer of each request; `rows` are distinct and `should_stop` is asked before each forward pass.

    Raises:
        Cancelled: `should_stop` said so.
    """
    rows = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens))  # longest first: memory runs out early

    def run(batch: list[Row]) -> list[tuple[int, Answer]]:
        if should_stop():
            raise Cancelled
        return _score_rows(loaded, batch)

    def on_shortage(batch: list[Row]) -> None:
        loaded.limits.shrink(len(batch) * len(batch[0].tokens))

    return dict(run_batches(run, rows, _fits(loaded, batch_size), on_shortage))


def _fits(loaded: LoadedModel, batch_size: int | None) -> Callable[[list[Row], Row], bool]:
    """Whether one more row, none longer than the first, leaves the others' answers alone, and fits: the requested size,
    ours, and the logits' memory."""
    position_bytes = 4 * loaded.vocabulary
    boundary = rope_boundary(loaded) or loaded.max_length

    def fits(batch: list[Row], row: Row) -> bool:
        count, width = len(batch) + 1, len(batch[0].tokens)
        if not loaded.scoring_company.allows(width, len(row.tokens)):
            return False
        if width > boundary and len(row.tokens) != width:
            return False
        start = min(member.first_scored for member in (*batch, row)) if loaded.narrows_logits else 0
        if count * (width - start) * position_bytes > loaded.limits.logits_bytes:
            return False
        return is_worthwhile(loaded.limits, len(batch), width, len(row.tokens), batch_size)

    return fits


@torch.inference_mode()
def _score_rows(loaded: LoadedModel, rows: list[Row]) -> list[tuple[int, Answer]]:
    """One forward pass: (index of the request, answer) for all targets of `rows`."""
    wanted = sorted({position for row in rows for position in range(row.first_scored, len(row.tokens))})
    column = {position: index for index, position in enumerate(wanted)}
    ids = pad_right([row.tokens for row in rows], loaded.device)
    logits = loaded.logits(ids, torch.tensor(wanted, device=loaded.device))
    answers: list[tuple[int, Answer]] = []
    for row, row_logits in zip(rows, logits, strict=True):
        scored = row_logits[column[row.first_scored] : column[len(row.tokens) - 1] + 1]
        answers += _score_targets(scored, row, loaded.softmax_dtype)
    return answers


def _score_targets(logits: torch.Tensor, row: Row, dtype: torch.dtype) -> list[tuple[int, Answer]]:
    """Answers from a row's logits [scored positions, vocabulary]; the last one predicts every target's last token."""
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)
    most_likely = log_probs.argmax(dim=-1)
    answers: list[tuple[int, Answer]] = []
    for index, continuation in row.targets:
        target = torch.tensor(continuation, device=logits.device)
        chosen = log_probs[-len(target) :].gather(1, target[:, None])
        is_greedy = bool((most_likely[-len(target) :] == target).all())
        answers.append((index, (float(chosen.sum()), is_greedy)))
    return answers

# pyright: basic
"""Scores continuations after their contexts, as lm-eval's HF backend does, with one row for each distinct input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from gpu_pool.messages import LoglikelihoodChunk
from gpu_pool.worker.engine.batching import PADDING_SHARE, Cancelled, greedy_batches, run_halving
from gpu_pool.worker.engine.loading import LoadedModel
from gpu_pool.worker.engine.padding import pad_right

Answer = tuple[float, bool]
"""(sum of the continuation's log-probabilities, whether each of its tokens is the most likely one)."""


@dataclass
class Row:
    """One distinct model input and the continuations whose last token follows it."""

    tokens: tuple[int, ...]
    targets: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """(index of the request, continuation)."""

    @property
    def first_scored(self) -> int:
        """The first position whose logits are needed: it predicts the longest continuation's first token."""
        return len(self.tokens) - max(len(continuation) for _, continuation in self.targets)


def score(loaded: LoadedModel, chunk: LoglikelihoodChunk, should_stop: Callable[[], bool]) -> tuple[Answer, ...]:
    """Answers in request order; `should_stop` is asked before each forward pass.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a request that cannot be scored (empty, longer than the model's context, not its vocabulary).
    """
    for context, continuation in chunk.requests:
        loaded.check_tokens((context, continuation))
    rows = _plan_rows(chunk.requests, loaded.max_length)
    answers: dict[int, Answer] = {}

    def run(batch: list[Row]) -> list[tuple[int, Answer]]:
        if should_stop():
            raise Cancelled
        return _score_rows(loaded, batch)

    for batch in greedy_batches(rows, _fits(loaded, chunk.batch_size)):
        answers.update(run_halving(run, batch))
    return tuple(answers[index] for index in range(len(chunk.requests)))


def _plan_rows(requests: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], max_length: int) -> list[Row]:
    """Distinct inputs, cut on the left to what the model can see; longest first, so that memory runs out early."""
    rows: dict[tuple[int, ...], Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError("a context or continuation is empty")
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context of {max_length}")
        tokens = (context + continuation)[-(max_length + 1) : -1]
        rows.setdefault(tokens, Row(tokens)).targets.append((index, continuation))
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))


def _fits(loaded: LoadedModel, batch_size: int | None) -> Callable[[list[Row], Row], bool]:
    """Whether one more row, none longer than the first, fits the requested size, or ours, and the logits' memory."""
    limits = loaded.limits
    position_bytes = 4 * loaded.model.get_input_embeddings().weight.shape[0]

    def fits(batch: list[Row], row: Row) -> bool:
        count, width = len(batch) + 1, len(batch[0].tokens)
        start = min(member.first_scored for member in (*batch, row)) if loaded.narrows_logits else 0
        if count * (width - start) * position_bytes > limits.logits_bytes:
            return False
        if batch_size:
            return count <= batch_size
        padded = len(row.tokens) < (1 - PADDING_SHARE) * width and len(batch) * width >= limits.worthwhile_tokens
        return not padded and count * width <= limits.scored_tokens

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

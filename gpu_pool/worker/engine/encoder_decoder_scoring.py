# pyright: basic
"""Scores continuations with an encoder-decoder model, as lm-eval's HF backend does with `backend="seq2seq"`.

A context is the encoder's input; a continuation is what the decoder is asked for, from its start token on. The encoder
runs once for each distinct context of a batch, the decoder once for each distinct input after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gpu_pool.worker.engine.batching import is_worthwhile, run_batches
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.encoder_decoder import (
    Tokens,
    decode,
    decoder_inputs,
    encode,
    pad_contexts,
    select,
)
from gpu_pool.worker.engine.head import Forward, logits_in_pieces
from gpu_pool.worker.engine.padding import pad_right
from gpu_pool.worker.engine.rows import Answer
from gpu_pool.worker.engine.token_scores import TokenScores

if TYPE_CHECKING:
    from gpu_pool.worker.engine.loaded_model import LoadedModel

Target = tuple[int, Tokens]
"""(index of the request, continuation)."""


@dataclass(frozen=True)
class Context:
    """A distinct encoder input and its decoder rows."""

    tokens: Tokens
    rows: list[Row]


@dataclass(frozen=True)
class Row:
    """A decoder input and the continuations that it scores, each from the row's beginning on."""

    inputs: Tokens
    targets: list[Target]


def score_pairs(
    loaded: LoadedModel,
    requests: Sequence[tuple[Tokens, Tokens]],
    batch_size: int | None,
    should_stop: Callable[[], bool],
    *,
    deterministic: bool = False,
) -> dict[int, Answer]:
    """The answer to each (context, continuation); `should_stop` is asked before each forward pass.

    `deterministic`: pieces of a row's logits do not depend on this worker's memory.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a request that cannot be scored (empty, longer than the model's context).
    """
    contexts = _plan_contexts(loaded, requests)

    most_positions = _most_positions(loaded, deterministic)

    def run(batch: list[Context]) -> list[tuple[int, Answer]]:
        return _score_contexts(loaded, batch, batch_size, most_positions, should_stop)

    def on_shortage(batch: list[Context]) -> None:
        loaded.limits.shrink(len(batch) * len(batch[0].tokens))

    return dict(run_batches(run, contexts, _contexts_fit(loaded, batch_size), on_shortage))


def _plan_contexts(loaded: LoadedModel, requests: Sequence[tuple[Tokens, Tokens]]) -> list[Context]:
    """Distinct contexts, cut on the left to what the encoder takes; longest first, so that memory runs out early."""
    targets: dict[Tokens, list[Target]] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError("a context or continuation is empty")
        if len(continuation) > loaded.max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context of {loaded.max_length}")
        targets.setdefault(context[-loaded.max_length :], []).append((index, continuation))
    contexts = [Context(tokens, _plan_rows(loaded.model, some)) for tokens, some in targets.items()]
    return sorted(contexts, key=lambda context: (-len(context.tokens), context.tokens))


def _plan_rows(model: Any, targets: Iterable[Target]) -> list[Row]:
    """Distinct decoder inputs; one that begins another is scored in the other's row. Longest first."""
    shifted = [(decoder_inputs(model, target[1]), target) for target in targets]
    rows: list[Row] = []
    for inputs, target in sorted(shifted, reverse=True):  # what begins with `inputs` comes right before it
        if not rows or rows[-1].inputs[: len(inputs)] != inputs:
            rows.append(Row(inputs, []))
        rows[-1].targets.append(target)
    return sorted(rows, key=lambda row: -len(row.inputs))


def _contexts_fit(loaded: LoadedModel, batch_size: int | None) -> Callable[[list[Context], Context], bool]:
    """Whether the encoder may take one more context, none longer than the first, with the others."""

    def fits(batch: list[Context], context: Context) -> bool:
        widths = len(batch[0].tokens), len(context.tokens)
        return loaded.company.allows(*widths) and is_worthwhile(loaded.limits, len(batch), *widths, batch_size)

    return fits


def _rows_fit(
    loaded: LoadedModel, width: int, batch_size: int | None, most_positions: int
) -> Callable[[list[Any], Any], bool]:
    """Whether the decoder may take one more row, none longer than the first, after contexts padded to `width`."""

    def fits(batch: list[tuple[int, Row]], item: tuple[int, Row]) -> bool:
        if loaded.company is Company.NONE:
            return False
        longest, length = len(batch[0][1].inputs), len(item[1].inputs)
        if (len(batch) + 1) * longest > most_positions:
            return False
        return is_worthwhile(loaded.limits, len(batch), width + longest, width + length, batch_size)

    return fits


def _most_positions(loaded: LoadedModel, deterministic: bool) -> int:
    """Positions whose logits there is room for."""
    head = loaded.model.get_output_embeddings() or loaded.model.get_input_embeddings()
    return loaded.limits.scored_positions(head.weight.shape[0], deterministic=deterministic)


@torch.inference_mode()
def _score_contexts(
    loaded: LoadedModel,
    contexts: list[Context],
    batch_size: int | None,
    most_positions: int,
    should_stop: Callable[[], bool],
) -> list[tuple[int, Answer]]:
    """Answers for all targets of `contexts`: one pass of the encoder, as many of the decoder as its rows need."""
    if should_stop():
        raise Cancelled
    ids, mask = pad_contexts([context.tokens for context in contexts], loaded.device)
    encoded = encode(loaded.model, ids, mask)

    def run(batch: list[tuple[int, Row]]) -> list[tuple[int, Answer]]:
        if should_stop():
            raise Cancelled
        places = torch.tensor([place for place, _ in batch], device=loaded.device)
        rows = [row for _, row in batch]
        decoder_ids = pad_right([row.inputs for row in rows], loaded.device)
        forward = partial(decode, loaded.model, select(encoded, places), mask[places], decoder_ids)
        scores = TokenScores(loaded.softmax_dtype)
        for start, logits in _pieces(loaded, forward, decoder_ids.shape, most_positions):
            scores.add(logits.flatten(0, 1), _asked(rows, start, logits.shape[1]))
        return list(scores.answers().items())

    def on_shortage(batch: list[tuple[int, Row]]) -> None:
        loaded.limits.shrink(len(batch) * (ids.shape[1] + len(batch[0][1].inputs)))

    rows = [(place, row) for place, context in enumerate(contexts) for row in context.rows]
    rows.sort(key=lambda item: -len(item[1].inputs))
    return list(run_batches(run, rows, _rows_fit(loaded, ids.shape[1], batch_size, most_positions), on_shortage))


def _pieces(
    loaded: LoadedModel, forward: Forward, shape: Sequence[int], most_positions: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, logits [rows, positions, vocabulary]) of decoder rows of this `shape`: as many as there is room
    for."""
    rows, width = shape
    positions = range(0, width, max(1, most_positions // rows))
    if len(positions) == 1 or loaded.layers is None:
        yield 0, forward()
    else:
        yield from zip(positions, logits_in_pieces(loaded.layers, forward, positions), strict=True)


def _asked(rows: Sequence[Row], start: int, width: int) -> list[tuple[int, int, int]]:
    """(row of logits, token, request) of all tokens that positions `start` to `start + width` of `rows` predict."""
    return [
        (place * width + position - start, token, index)
        for place, row in enumerate(rows)
        for index, continuation in row.targets
        for position, token in enumerate(continuation)
        if start <= position < start + width
    ]

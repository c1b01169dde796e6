# pyright: basic
"""Log-likelihood requests, as lm-eval's HF backend answers them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from gpu_pool.chunk_messages import LoglikelihoodChunk
from gpu_pool.worker.engine import plain_scoring, tree_scoring
from gpu_pool.worker.engine.cpu_layers import layers_for
from gpu_pool.worker.engine.encoder_decoder_scoring import score_pairs
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.routes import Route
from gpu_pool.worker.engine.rows import Answer, Row, plan_rows

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""(context, continuation)."""


class Scored(NamedTuple):
    """What a chunk's requests score."""

    answers: tuple[Answer, ...]
    """In request order."""
    plainly: str = ""
    """Why a model that goes along the token tree did not so for some of them."""


def score(loaded: LoadedModel, chunk: LoglikelihoodChunk, should_stop: Callable[[], bool]) -> tuple[Answer, ...]:
    """The answers alone; as `score_chunk`."""
    return score_chunk(loaded, chunk, should_stop).answers


def score_chunk(loaded: LoadedModel, chunk: LoglikelihoodChunk, should_stop: Callable[[], bool]) -> Scored:
    """The answers to a chunk; `should_stop` is asked before each forward pass.

    Raises:
        Cancelled: `should_stop` said so.
        ValueError: a request that cannot be scored (empty, longer than the model's context, not its vocabulary).
    """
    with layers_for(deterministic=chunk.deterministic):
        return _score(loaded, chunk, should_stop)


def _score(loaded: LoadedModel, chunk: LoglikelihoodChunk, should_stop: Callable[[], bool]) -> Scored:
    loaded.check_tokens([array("I", chunk.sequences.tokens)])
    sequences = map(tuple, chunk.sequences.unpack())
    pairs = [(ids[:-scored], ids[-scored:]) for ids, scored in zip(sequences, chunk.scored, strict=True)]
    along: list[Row] = []
    if loaded.route[0] is Route.TREE:
        along = [row for row in plan_rows(pairs, loaded.max_length) if loaded.goes_along_tree(len(row.tokens))]
    options = {"deterministic": chunk.deterministic}
    answers = tree_scoring.score_rows(loaded, along, chunk.batch_size, should_stop, **options) if along else {}
    others = [index for index in range(len(pairs)) if index not in answers]
    plainly = ""
    if others and loaded.route[0] is Route.TREE and (boundary := loaded.tree_boundary) is not None:
        plainly = boundary.reason
        loaded.tell_plain("some log-likelihoods", plainly)
    score_plainly = partial(_score_plainly, loaded, chunk.batch_size, should_stop, chunk.deterministic)
    alone = ([index] for index in others)  # each request in forward passes of its own
    for indexes in alone if chunk.deterministic else [others] if others else []:
        found = score_plainly([pairs[index] for index in indexes])
        answers.update((indexes[place], answer) for place, answer in found.items())
    return Scored(tuple(answers[index] for index in range(len(pairs))), plainly)


def _score_plainly(
    loaded: LoadedModel,
    batch_size: int | None,
    should_stop: Callable[[], bool],
    deterministic: bool,
    pairs: Sequence[Pair],
) -> dict[int, Answer]:
    if loaded.is_encoder_decoder:
        return score_pairs(loaded, pairs, batch_size, should_stop, deterministic=deterministic)
    rows = plan_rows(pairs, loaded.max_length)
    return plain_scoring.score_rows(loaded, rows, batch_size, should_stop, deterministic=deterministic)

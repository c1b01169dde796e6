"""Requests in the chunks that an evaluator makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from token_trees import distinct

from gpu_pool.evaluator.prefix_line import Line
from gpu_pool.evaluator.requests import Unit
from gpu_pool.evaluator.trie_order import in_trie_order
from gpu_pool.worker.engine.blocks import Tokens, common_prefix

Pair = tuple[Tokens, Tokens]
"""(context, continuation)."""


def as_sent(pairs: Sequence[Pair], cost: float) -> list[list[Pair]]:
    """Chunks of so much cost, in the order and by the cuts of an evaluator."""
    units = [Unit(prompt=np.array(context), continuation=np.array(more)) for context, more in pairs]
    line = Line("loglikelihood")
    line.add(in_trie_order(units))
    chunks: list[list[Pair]] = []
    while chunk := line.take("worker", cost):
        chunks.append([(tuple(unit.prompt.tolist()), tuple(unit.continuation.tolist())) for unit in chunk.units])
        line.done("worker", chunk)
    return chunks


def trie_size(requests: Sequence[Pair]) -> int:
    """Distinct tokens of what the model has to read."""
    inputs = distinct((context + continuation)[:-1] for context, continuation in requests)
    neighbours = itertools.pairwise([(), *inputs])
    return sum(len(tokens) - common_prefix(before, tokens) for before, tokens in neighbours)

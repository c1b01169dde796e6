"""Chunks as an evaluator sends them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_pool.chunk_messages import GenerationChunk, GenerationOptions, LoglikelihoodChunk
from gpu_pool.token_sequences import TokenSequences

Request = tuple[Sequence[int], Sequence[int]]
"""(context, continuation)."""


def scoring(requests: Sequence[Request], chunk_id: int = 1, **fields: Any) -> LoglikelihoodChunk:
    """Score each continuation after its context."""
    return LoglikelihoodChunk(
        chunk_id=chunk_id,
        sequences=TokenSequences.pack([*context, *continuation] for context, continuation in requests),
        scored=tuple(len(continuation) for _, continuation in requests),
        **fields,
    )


def generating(prompts: Sequence[Sequence[int]], chunk_id: int = 1, **fields: Any) -> GenerationChunk:
    """Continue each prompt; `fields` are the chunk's and the options'."""
    options = {name: fields.pop(name) for name in GenerationOptions.__struct_fields__ if name in fields}
    return GenerationChunk(
        chunk_id=chunk_id,
        prompts=TokenSequences.pack(map(list, prompts)),
        options=GenerationOptions(**options),
        **fields,
    )

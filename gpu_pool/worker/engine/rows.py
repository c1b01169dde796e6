"""Log-likelihood requests as distinct model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


def plan_rows(requests: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], max_length: int) -> list[Row]:
    """Distinct inputs of (context, continuation) requests, cut on the left to what the model can see.

    Raises:
        ValueError: a request that cannot be scored.
    """
    rows: dict[tuple[int, ...], Row] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError("a context or continuation is empty")
        if len(continuation) > max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds the context of {max_length}")
        tokens = (context + continuation)[-(max_length + 1) : -1]
        rows.setdefault(tokens, Row(tokens)).targets.append((index, continuation))
    return list(rows.values())

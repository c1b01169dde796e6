# pyright: basic
"""From logits to answers: log-probabilities of tokens, and their sums."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from gpu_pool.worker.engine.rows import Answer
from gpu_pool.worker.engine.transfer import to_device

_ROWS_ON_CPU = 64
"""Positions whose logits are reduced together: little enough for its cache."""
_BYTES_ON_GPU = 1 << 30
"""What log-probabilities that are computed together may take: enough positions to fill any GPU."""


class Sums:
    """What is known of each request's answer so far: its tokens may be scored in several forward passes."""

    def __init__(self) -> None:
        self._values: dict[int, float] = {}
        self._greedy: dict[int, bool] = {}

    def include(self, request: int, value: float, is_greedy: bool) -> None:
        """A token's score, in order of positions: a sum's bits depend on the order of its terms."""
        self._values[request] = self._values.get(request, 0.0) + value
        self._greedy[request] = self._greedy.get(request, True) and is_greedy

    def answers(self) -> dict[int, Answer]:
        """Of every request that a token was scored for."""
        return {request: (value, self._greedy[request]) for request, value in self._values.items()}


class TokenScores(Sums):
    """Sums of what tokens score by their logits."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: of the softmax."""
        super().__init__()
        self._dtype = dtype

    def add(self, logits: torch.Tensor, asked: Iterable[tuple[int, int, int]]) -> None:
        """Score each (row, token, request) of `asked`: the token by its row of `logits` [m, vocabulary]."""
        ordered = sorted(asked)
        if not ordered:
            return
        rows, tokens, _ = np.array(ordered).T
        scored = zip(*(scores.tolist() for scores in token_log_probs(logits, rows, tokens, self._dtype)), strict=True)
        for (_, _, request), (value, is_greedy) in zip(ordered, scored, strict=True):
            self.include(request, value, is_greedy)


def token_log_probs(
    logits: torch.Tensor, rows: np.ndarray, tokens: np.ndarray, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability, whether it is the most likely) of `tokens` [n] in `rows` [n], ascending, of logits [m, V].

    The host does not wait for the device.

    By the function that lm-eval's HF backend uses: the sum over a vocabulary in fp32 errs by up to 1e-5, here as there.
    """
    values, greedy = [], []
    row_index, token_index = to_device([rows, tokens], logits.device)
    count = rows_at_once(logits.device, logits.shape[-1], dtype)
    for start in range(0, logits.shape[0], count):
        end = min(start + count, logits.shape[0])
        first, last = np.searchsorted(rows, [start, end]).tolist()
        if first == last:
            continue
        some = torch.log_softmax(logits[start:end], dim=-1, dtype=dtype)
        row, token = row_index[first:last] - start, token_index[first:last]
        values.append(some[row, token])
        greedy.append(some.argmax(-1)[row] == token)
    return torch.cat(values).double(), torch.cat(greedy)


def rows_at_once(device: torch.device, vocabulary: int, dtype: torch.dtype) -> int:
    """How many positions are reduced together, their log-probabilities being of this type."""
    return _ROWS_ON_CPU if device.type == "cpu" else max(1, _BYTES_ON_GPU // (vocabulary * dtype.itemsize))

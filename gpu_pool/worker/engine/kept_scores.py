# pyright: basic
"""Log-probabilities of a kept beginning's own tokens, for later chunks that score them, too."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gpu_pool.worker.engine.blocks import Block, BlockPath, Tokens, common_prefix

Score = tuple[float, bool]
"""(log-probability of a token, whether it is the most likely one)."""
Computed = Mapping[Block, Mapping[tuple[int, int], Score]]
"""By block: of (index in it, token that follows there)."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of a sequence's first tokens, each after those before it, as far as they have been scored."""

    log_probs: np.ndarray = field(default_factory=lambda: np.empty(0))
    """[tokens] float64, NaN where not scored; nothing is known of the tokens beyond."""
    greedy: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """[tokens] bool: whether it is the most likely one."""

    @property
    def nbytes(self) -> int:
        return self.log_probs.nbytes + self.greedy.nbytes

    @property
    def first(self) -> int:
        """The position of the first token that is scored, the number of tokens if none is."""
        return int(np.argmax(np.append(~np.isnan(self.log_probs), True)))

    def between(self, start: int, end: int) -> list[Score]:
        """Of the tokens at positions start to end."""
        return list(zip(self.log_probs[start:end].tolist(), self.greedy[start:end].tolist(), strict=True))

    def until(self, end: int) -> Scores:
        """Of the first `end` tokens."""
        return Scores(self.log_probs[:end], self.greedy[:end])

    def scored_until(self, start: int, end: int) -> int:
        """Where the scored tokens that begin at `start` end: at `end` at the latest."""
        return start + int(np.argmax(np.append(np.isnan(self.log_probs[start:end]), True)))

    @classmethod
    def of(cls, scores: Mapping[int, Score]) -> Scores:
        """Of the tokens at these positions."""
        size = max(scores, default=-1) + 1
        log_probs, greedy = np.full(size, np.nan), np.zeros(size, bool)
        for position, score in scores.items():
            log_probs[position], greedy[position] = score
        return cls(log_probs, greedy)

    def and_those_of(self, other: Scores, end: int) -> Scores:
        """These, and of the first `end` tokens what only `other` knows."""
        own, others = (np.flatnonzero(~np.isnan(log_probs)) for log_probs in (self.log_probs, other.log_probs[:end]))
        if not len(others):
            return self
        size = max(len(self.log_probs), int(others[-1]) + 1)
        log_probs, greedy = np.full(size, np.nan), np.zeros(size, bool)
        for scores, known in ((other, others), (self, own)):
            log_probs[known], greedy[known] = scores.log_probs[known], scores.greedy[known]
        return Scores(log_probs, greedy)


NO_SCORES = Scores()


def scores_along(path: BlockPath, tokens: Tokens, computed: Computed) -> Scores:
    """Of `tokens`, which `path` holds, what was `computed` in its blocks."""
    found: dict[int, Score] = {}
    for block, length in path.sources:
        for (index, token), score in computed.get(block, {}).items():
            position = block.start + index + 1
            if index < length and tokens[position : position + 1] == (token,):
                found[position] = score
    return Scores.of(found) if found else NO_SCORES


def comparable(shared: int, grid: int) -> int:
    """The first tokens whose scores are the same for two sequences that begin with `shared` tokens in common.

    With a grid to the bit: those that whole blocks of it predict, in which nothing differs.
    """
    return min(shared, shared // grid * grid + 1)


def find_scores(
    sequences: Sequence[Tokens], needed_from: Sequence[int], known: Sequence[tuple[Tokens, Scores]], grid: int
) -> list[tuple[int, Scores]]:
    """For each of `sequences` (sorted): the first position whose output is still needed, and scores up to there.

    `needed_from` are those positions without anything known. The tokens at positions `needed_from[i]` + 1 to the new
    one, inclusive, are scored in what is returned for sequence i. `known` are beginnings of some of the sequences.
    """
    found = [(needed, NO_SCORES) for needed in needed_from]
    lowest = min(needed_from)
    for tokens, scores in known:
        least = max(scores.first, lowest + 1)
        place = bisect_left(sequences, tokens)
        for indexes in (range(place, len(sequences)), range(place - 1, -1, -1)):
            for index in indexes:
                same = common_prefix(tokens, sequences[index])
                if same <= least:
                    break
                needed = scores.scored_until(needed_from[index] + 1, comparable(same, grid)) - 1
                if needed > found[index][0]:
                    found[index] = needed, scores
    return found

"""Which known names are close to one that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHORTLIST = 60


def close_names(name: str, known: Iterable[str], count: int = 5) -> tuple[str, ...]:
    """The up to `count` names of `known` that `name` may have meant, closest first.

    difflib compares slowly, so of thousands of names only those that share letter pairs with `name` reach it.
    """
    wanted = name.lower()
    pairs = _letter_pairs(wanted)
    scored = [(_overlap(pairs, _letter_pairs(candidate.lower())), candidate) for candidate in known]
    shortlist = sorted((item for item in scored if item[0] > 0), reverse=True)[:_SHORTLIST]
    ratios = [
        (difflib.SequenceMatcher(None, wanted, candidate.lower()).ratio(), candidate) for _, candidate in shortlist
    ]
    return tuple(candidate for ratio, candidate in sorted(ratios, reverse=True)[:count] if ratio >= 0.5)


def _letter_pairs(name: str) -> set[str]:
    padded = f" {name} "
    return {padded[i : i + 2] for i in range(len(padded) - 1)}


def _overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)

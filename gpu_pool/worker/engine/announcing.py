"""What a person should know of how a model is computed, in the worker's log whatever is logged there."""

from __future__ import annotations

import sys

LONG = 1024
"""Tokens of a sequence beyond which a forward pass may take minutes on a CPU."""


def announce(what: str) -> None:
    print(f"engine: {what}", file=sys.stderr, flush=True)


def announce_if_long(tokens: int, what: str) -> None:
    """Before sequences of so many tokens are computed to try something out."""
    if tokens > LONG:
        announce(what)

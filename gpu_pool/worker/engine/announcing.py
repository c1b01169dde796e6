"""What a person should know of how a model is computed, in the worker's log whatever is logged there."""

from __future__ import annotations

import sys


def announce(what: str) -> None:
    print(f"engine: {what}", file=sys.stderr, flush=True)

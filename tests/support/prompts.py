"""Prompts that share something, for tests of the engine."""

from __future__ import annotations

import random
from typing import Any

Tokens = tuple[int, ...]
SAMPLING: dict[str, Any] = {"do_sample": True, "kwargs": {"temperature": 0.9, "top_p": 0.95}}


def make_prompts(count: int = 20) -> list[Tokens]:
    """Questions of many lengths after one of two beginnings of 50 tokens, or after none."""
    source = random.Random(0)

    def tokens(count: int) -> Tokens:
        return tuple(source.randrange(3, 300) for _ in range(count))

    beginnings = [tokens(50), tokens(50), ()]
    return [(*beginnings[index % 3], 3 + index, *tokens(source.randint(0, 40))) for index in range(count)]


PROMPTS = make_prompts()
SEEDS = tuple(range(len(PROMPTS)))

"""Which variables of the environment hold keys of judges: models behind somebody's endpoint that tasks have score."""

from __future__ import annotations

from collections.abc import Iterable

KEY_ENDINGS = ("API_KEY", "BEARER_TOKEN_BEDROCK")
"""Ends of the names, in all that lmms-eval's tasks read."""


def judge_keys(names: Iterable[str]) -> set[str]:
    """Those of the variables' names."""
    return {name for name in names if name.endswith(KEY_ENDINGS)}

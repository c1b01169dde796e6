"""Prompts to be continued."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row to be generated."""

    chunk_id: int
    index: int
    """In its chunk."""
    tokens: tuple[int, ...]
    seed: int

"""A scored task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TaskScore:
    """What a library makes of one task's answers."""

    metrics: dict[str, Any]
    samples: list[dict[str, Any]] | None
    """A record of each document; None where nobody wants them."""
    accumulated: Any
    """The library's own record, which its results of groups are made of."""
    excluded: int = 0
    """Documents that are left out, for want of an answer."""

"""A scored task, and what a group of tasks consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    missing: dict[str, str] = field(default_factory=dict)
    """Metrics that have no score without those: {"metric,filter": why}."""


def members(name: str, subtasks: Mapping[str, Sequence[str]]) -> set[str]:
    """A task or group and all that it consists of, once however many ways lead there.

    `subtasks` are tasks and groups directly below a group.
    """
    return {name}.union(*(members(below, subtasks) for below in subtasks.get(name, ())))

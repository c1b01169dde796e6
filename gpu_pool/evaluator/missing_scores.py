"""Scores that cannot be had without the documents that are left out: which ones, and why.

A metric over pairs or groups of documents may need all of each. It is told as missing then, not as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gpu_pool.evaluator.failures import explain
from gpu_pool.evaluator.scores import members

T = TypeVar("T")

MISSING = "evalpool_missing"
"""Beside a task's or group's scores: {"metric,filter": why it has none}. Not there when none is missing."""

Values = dict[tuple[str, str], list[Any]]
"""What each document counts in each (metric, filter)."""


def aggregated(aggregate: Callable[[Values], T], values: Values, *, excluded: int) -> tuple[T, dict[str, str]]:
    """What `aggregate` makes of the values, and the metrics that have no score, for want of `excluded` documents."""
    try:
        return aggregate(values), {}
    except Exception:
        if not excluded:
            raise
    missing: dict[str, str] = {}
    kept: Values = {}
    for (metric, filter_name), items in values.items():
        one: Values = {(metric, filter_name): items}
        try:
            aggregate(one)
        except Exception as error:  # whatever tasks' code raises
            documents = "1 document is" if excluded == 1 else f"{excluded} documents are"
            missing[f"{metric},{filter_name}"] = f"{documents} left out: {explain(error)}"
        else:
            kept |= one
    return aggregate(kept), missing


def without_missing(
    metrics: Mapping[str, Mapping[str, Any]],
    missing: Mapping[str, Mapping[str, str]],
    subtasks: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, Any]]:
    """The scores of tasks and groups with MISSING, and no score of a group that one of its tasks has none of.

    `subtasks` are tasks and groups directly below a group.
    """
    shown: dict[str, dict[str, Any]] = {}
    for name, values in metrics.items():
        reasons = dict(missing.get(name, {}))
        for task in sorted(members(name, subtasks) & missing.keys() - {name}):
            reasons |= {key: f"{task} has none" for key in missing[task] if key in values and key not in reasons}
        kept = {key: value for key, value in values.items() if not any(_is_of(key, gone) for gone in reasons)}
        shown[name] = {**kept, MISSING: reasons} if reasons else kept
    return shown


def _is_of(key: str, score: str) -> bool:
    """Whether it is the key of this score, or of one of its standard errors."""
    metric, _, filter_name = score.partition(",")
    return key == score or (key.startswith(f"{metric}_stderr") and key.endswith(f",{filter_name}"))

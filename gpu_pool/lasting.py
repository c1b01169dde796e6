"""What of a job's files depends on its request and model alone: all but the volatile fields, which are listed here.

A job that was interrupted and run again, on other workers or from the cache, gives the same lasting content: the same
bytes under `deterministic: true`, otherwise the same texts and picks, and numbers within a small tolerance.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

ENVIRONMENT_FIELDS = ("git_hash", "upper_git_hash", "transformers_version", "lm_eval_version")
"""Of a results file: what the same installation says each time."""

VOLATILE_FIELDS = (
    # times and durations
    "date",
    "start_time",
    "end_time",
    "total_evaluation_time_seconds",
    *ENVIRONMENT_FIELDS,
    # the run: who computed what
    "evalpool.job_id",
    "evalpool.cached_requests",
    "evalpool.workers",
    # what a worker says of the model that it loaded; nobody says it where the cache answered everything
    "config.model_dtype",
    "evalpool.dtype",
    "evalpool.attn_implementation",
    "evalpool.engine_routes",
    "evalpool.engine_plain_requests",
)
"""Of a results file, as dotted paths. Samples files have none; both have the job's date in their names."""

RELATIVE_TOLERANCE = 1e-5
"""Of log-probabilities and of scores made of them in fp32, relative to max(1, |value|), without `deterministic`."""


def lasting_results(path: Path) -> dict[str, Any]:
    """A results file without its volatile fields."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return without_volatile(results)


def without_volatile(results: dict[str, Any]) -> dict[str, Any]:
    """A copy of a results file's content without the volatile fields."""
    lasting = copy.deepcopy(results)
    for field in VOLATILE_FIELDS:
        *parents, name = field.split(".")
        place: Any = lasting
        for parent in parents:
            place = place.get(parent, {})
        place.pop(name, None)
    return lasting


def differences(one: Any, other: Any, tolerance: float = 0.0) -> list[str]:
    """Where two JSON values differ, as `path: value, value`; empty where they are the same.

    Numbers, and texts that are numbers (samples files have log-probabilities as text), may differ by `tolerance`,
    relative to max(1, |value|).
    """
    return list(_differences("", one, other, tolerance))


def sample_differences(one: Path, other: Path, tolerance: float = 0.0) -> list[str]:
    """`differences` of two samples files, line by line."""
    return differences(_lines(one), _lines(other), tolerance)


def _lines(path: Path) -> list[Any]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _differences(path: str, one: Any, other: Any, tolerance: float) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        ones, others = cast("dict[str, Any]", one), cast("dict[str, Any]", other)
        for name in dict.fromkeys((*ones, *others)):
            if name not in ones or name not in others:
                yield f"{path}.{name}: only in {'the first' if name in ones else 'the second'}"
            else:
                yield from _differences(f"{path}.{name}", ones[name], others[name], tolerance)
    elif isinstance(one, list) and isinstance(other, list):
        yield from _list_differences(path, cast("list[Any]", one), cast("list[Any]", other), tolerance)
    elif not _same(one, other, tolerance):
        yield f"{path}: {one!r}, {other!r}"


def _list_differences(path: str, one: Sequence[Any], other: Sequence[Any], tolerance: float) -> Iterator[str]:
    if len(one) != len(other):
        yield f"{path}: {len(one)} items, {len(other)} items"
        return
    for index, (first, second) in enumerate(zip(one, other, strict=True)):
        yield from _differences(f"{path}[{index}]", first, second, tolerance)


def _same(one: Any, other: Any, tolerance: float) -> bool:
    if one == other and isinstance(one, bool) == isinstance(other, bool):
        return True
    if tolerance == 0.0:
        return _is_nan(one) and _is_nan(other)
    first, second = _number(one), _number(other)
    if first is None or second is None:
        return False
    if math.isfinite(first) and math.isfinite(second):
        return abs(first - second) <= tolerance * max(1.0, abs(first))
    return first == second or (math.isnan(first) and math.isnan(second))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _number(value: Any) -> float | None:
    """`value` as a number where it is one, or a text of one with a fraction or exponent."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str) and any(mark in value for mark in ".en"):
        try:
            return float(value)
        except ValueError:
            return None
    return None

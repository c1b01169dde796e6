"""Metrics that need the documents that are left out."""

from __future__ import annotations

from typing import Any

import pytest

from gpu_pool.evaluator.missing_scores import MISSING, Values, aggregated, without_missing

VALUES: Values = {("acc", "none"): [1, 0, 1], ("pairs", "none"): [1, 0, 1], ("pairs", "strict"): [1, 0]}


def aggregate(values: Values) -> dict[str, float]:
    for (metric, _), items in values.items():
        if metric == "pairs" and len(items) % 2:
            raise AssertionError("only pairs")
    return {",".join(key): sum(items) / len(items) for key, items in values.items()}


def test_a_metric_that_needs_what_is_left_out_is_missing_and_others_are_not() -> None:
    scores, missing = aggregated(aggregate, VALUES, excluded=1)
    assert scores == {"acc,none": 2 / 3, "pairs,strict": 0.5}
    assert missing == {"pairs,none": "1 document is left out: AssertionError: only pairs"}


def test_where_nothing_is_left_out_the_error_is_the_task_s() -> None:
    with pytest.raises(AssertionError, match="only pairs"):
        aggregated(aggregate, VALUES, excluded=0)


def test_a_group_has_no_score_that_one_of_its_tasks_has_none_of() -> None:
    metrics: dict[str, dict[str, Any]] = {
        "all": {"pairs,none": 0.5, "pairs_stderr,none": 0.1, "pairs_stderr_clt,none": 0.1, "pairs,strict": 0.4},
        "part": {"alias": "part"},
        "a": {"pairs,strict": 0.4},
        "b": {"pairs,none": 0.5, "pairs,strict": 0.4},
    }
    shown = without_missing(metrics, {"a": {"pairs,none": "why"}}, {"all": ["part", "b"], "part": ["a"]})
    assert shown == {
        "all": {"pairs,strict": 0.4, MISSING: {"pairs,none": "a has none"}},
        "part": {"alias": "part"},
        "a": {"pairs,strict": 0.4, MISSING: {"pairs,none": "why"}},
        "b": metrics["b"],
    }

"""Requests that ended in an error: when they are too many, and where they are counted."""

from __future__ import annotations

import threading

import pytest

from gpu_pool.evaluator.errored import METRIC, Errored


def test_without_any_all_is_well() -> None:
    errored = Errored(0.0)
    assert errored.by_task == {}
    assert errored.too_many(100, is_final=True) is None
    assert errored.too_many(0, is_final=True) is None, "nor in a job without requests"
    assert errored.beside({"t": {"acc,none": 0.5}}, {}) == {"t": {"acc,none": 0.5}}


def test_where_none_is_allowed_the_first_one_is_certain() -> None:
    errored = Errored(0.0)
    errored.add({"t": 1}, "it broke")
    assert errored.too_many(50, is_final=False) == (
        "1 of 50 requests so far ended in an error (2.00%, more than max_error_share 0 allows): it broke (1)"
    )


@pytest.mark.parametrize(("total", "too_many"), [(9, True), (10, False), (11, False)])
def test_a_share_is_judged_by_all_requests(total: int, too_many: bool) -> None:
    errored = Errored(0.2)
    errored.add({"t": 2}, "it broke")
    assert errored.too_many(3, is_final=False) is None, "more requests may follow"
    assert (errored.too_many(total, is_final=True) is not None) == too_many


def test_all_may_fail_where_that_is_allowed() -> None:
    errored = Errored(1.0)
    errored.add({"t": 10}, "it broke")
    assert errored.too_many(10, is_final=True) is None


def test_the_first_causes_are_named_and_the_others_counted() -> None:
    errored = Errored(0.0)
    for cause, count in (("a", 1), ("b", 3), ("c", 1), ("d", 1), ("e", 1)):
        errored.add({"t": count}, cause)
    errored.add({"u": 4}, "a")
    reason = errored.too_many(11, is_final=True) or ""
    assert reason.endswith("allows): a (5); b (3); c (1); and 2 other causes")
    assert reason.startswith("11 of 11 requests ended in an error (100.00%")


def test_the_report_has_every_task() -> None:
    errored = Errored(0.5)
    errored.add({"t": 2, "u": 1}, "a")
    errored.add({"t": 1}, "b")
    assert errored.report({"t": 10, "u": 4, "well": 7}, {"t": 2, "u": 1}) == {
        "errored": 4,
        "max_error_share": 0.5,
        "tasks": {
            "t": {"answered": 7, "errored_excluded": 3, "documents_excluded": 2, "causes": {"a": 2, "b": 1}},
            "u": {"answered": 3, "errored_excluded": 1, "documents_excluded": 1, "causes": {"a": 1}},
            "well": {"answered": 7, "errored_excluded": 0, "documents_excluded": 0, "causes": {}},
        },
    }
    assert errored.by_task == {"t": 3, "u": 1}, "a report changes nothing"


def test_a_count_of_nothing_is_no_task_with_errors() -> None:
    errored = Errored(0.0)
    errored.add({"t": 0}, "it broke")  # of a unit that nobody waits for any more
    assert errored.by_task == {}
    assert errored.too_many(10, is_final=True) is None


def test_groups_count_what_is_below_them() -> None:
    errored = Errored(1.0)
    errored.add({"t": 2, "u": 1}, "it broke")
    metrics = {name: {"acc,none": 0.5} for name in ("all", "some", "well", "t", "u", "v")}
    subtasks = {"all": ["some", "u"], "some": ["t", "v"], "well": ["v"]}
    shown = errored.beside(metrics, subtasks)
    assert {name: values.get("evalpool_errored") for name, values in shown.items()} == {
        "all": 3,
        "some": 2,
        "well": None,
        "t": 2,
        "u": 1,
        "v": None,
    }
    assert "evalpool_errored" not in metrics["t"], "what was given stays as it was"


def test_a_task_in_two_groups_counts_once_above_both() -> None:
    errored = Errored(1.0)
    errored.add({"t": 2, "u": 1}, "it broke")
    subtasks = {"all": ["some", "others"], "some": ["t"], "others": ["t", "u"]}
    shown = errored.beside({name: {} for name in subtasks}, subtasks)
    assert shown == {"all": {METRIC: 3}, "some": {METRIC: 2}, "others": {METRIC: 3}}


def test_threads_lose_no_count() -> None:
    errored = Errored(1.0)
    threads = [threading.Thread(target=lambda: [errored.add({"t": 1}, "a") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errored.by_task == {"t": 2000}
    assert errored.report({"t": 2000}, {})["tasks"]["t"]["causes"] == {"a": 2000}

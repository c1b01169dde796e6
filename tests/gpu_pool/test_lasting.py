from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_pool.lasting import VOLATILE_FIELDS, differences, lasting_results, sample_differences, without_volatile


def test_volatile_fields_go_and_all_others_stay(tmp_path: Path):
    results = {
        "results": {"task": {"acc,none": 0.5}},
        "date": 1.5,
        "config": {"model_dtype": "float32", "limit": 8},
        "evalpool": {"job_id": "a", "workers": {"w": 3}, "requests": 3},
    }
    lasting = {"results": results["results"], "config": {"limit": 8}, "evalpool": {"requests": 3}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert lasting_results(path) == lasting
    assert without_volatile(results) == lasting
    assert "date" in results
    assert without_volatile({"results": {}}) == {"results": {}}
    assert len(set(VOLATILE_FIELDS)) == len(VOLATILE_FIELDS)


@pytest.mark.parametrize(
    ("one", "other", "where"),
    [
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y"}]}, [".a[1].b: 'x', 'y'"]),
        ({"a": 1, "b": 2}, {"a": 1}, [".b: only in the first"]),
        ({"a": 1}, {"a": 1, "b": 2}, [".b: only in the second"]),
        ([1, 2], [1], [": 2 items, 1 items"]),
        (1.0, 1.0000001, [": 1.0, 1.0000001"]),
        (True, 1, [": True, 1"]),
        ([float("nan")], [float("nan")], []),
        ({"a": None}, {"a": None}, []),
    ],
)
def test_differences(one: object, other: object, where: list[str]):
    assert differences(one, other) == where


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (-100.0, -100.0009, True),
        (-100.0, -100.0011, False),
        (0.000001, 0.000002, True),  # relative to 1 below 1
        ("-100.0", "-100.0009", True),
        ("-100.0", "-100.0011", False),
        ("True", "False", False),
        (True, False, False),
        ("12", "13", False),
        ("ten", "net", False),
        (float("nan"), 1.0, False),
        (float("inf"), float("inf"), True),
        (float("-inf"), 1.0, False),
        (None, 0.0, False),
    ],
)
def test_tolerance(one: object, other: object, same: bool):
    assert (differences(one, other, 1e-5) == []) is same


def test_samples_files(tmp_path: Path):
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text('{"resps": [["-1.5", "True"]]}\n{"acc": 1.0}\n')
    other.write_text('{"resps": [["-1.5000001", "True"]]}\n{"acc": 1.0}\n')
    assert sample_differences(one, other) == ["[0].resps[0][0]: '-1.5', '-1.5000001'"]
    assert sample_differences(one, other, 1e-5) == []

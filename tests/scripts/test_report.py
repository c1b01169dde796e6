"""Tables and JSON of the benchmarks."""

from __future__ import annotations

import json

import pytest
from machine import describe_machine
from report import in_words, print_report

ROWS = [{"what": "a", "per second": 1234.5}, {"what": "b", "per second": 0.01234, "note": None}]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1234567, "1,234,567"),
        (12345.678, "12,346"),
        (99.96, "100"),
        (12.34, "12.3"),
        (1.0, "1.00"),
        (0.01234, "0.0123"),
        (0.0, "0.00"),
        (-123.4, "-123"),
        (True, "True"),
        (None, ""),
        ("text", "text"),
    ],
)
def test_values_in_words(value: object, words: str) -> None:
    assert in_words(value) == words


def test_json_has_everything_with_all_digits(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("Title", describe_machine(), ROWS, {"seconds": 1.23456}, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["title"] == "Title"
    assert document["machine"]["cpu"] == describe_machine().cpu
    assert document["facts"] == {"seconds": 1.23456}
    assert document["rows"] == ROWS


def test_the_table_has_machine_facts_and_columns_of_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("Title", describe_machine(), ROWS, {"seconds": 1.23456})
    printed = capsys.readouterr().out
    assert describe_machine().commit in printed
    assert "seconds: 1.23" in printed
    for word in ("what", "per second", "note", "1,234", "0.0123"):
        assert word in printed

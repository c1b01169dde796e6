"""The benchmark of the REST face: its arithmetic, and all of it once with few requests on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_api import Endpoint, Round, cpu_seconds, rows_of
from http_load import Measurement

ROOT = Path(__file__).parents[2]
HEALTH = Endpoint(name="GET /health", method="GET", target="/health")


def one_round(rate: float, cpu: float, count: int = 10) -> Round:
    """`count` requests at `rate` a second, for `cpu` seconds of the server each."""
    seen = Measurement(seconds=count / rate, latencies=[1 / rate] * count, client_cpu_seconds=0.0)
    return Round(seen=seen, server_cpu_seconds=cpu * count)


def test_ratios_are_medians_over_neighbouring_rounds() -> None:
    """A neighbour that slows one pair of rounds down changes no ratio."""
    ours = [one_round(1000, 1e-4), one_round(10, 1e-4), one_round(1000, 2e-4)]
    theirs = [one_round(500, 4e-4), one_round(5, 4e-4), one_round(500, 4e-4)]
    mine, other = rows_of("idle", HEALTH, ours, theirs)
    assert mine["rate / FastAPI's"] == pytest.approx(2)
    assert mine["CPU / FastAPI's"] == pytest.approx(0.25)
    assert (mine["server"], other["server"]) == ("evalpool", "FastAPI")
    assert "rate / FastAPI's" not in other


def test_rounds_without_any_cpu_time_have_no_ratio() -> None:
    ours, theirs = [one_round(1, 1e-4)] * 2, [one_round(1, 0.0), one_round(1, 2e-4)]
    assert next(rows_of("idle", HEALTH, ours, theirs))["CPU / FastAPI's"] == pytest.approx(0.5)
    assert next(rows_of("idle", HEALTH, ours[:1], theirs[:1]))["CPU / FastAPI's"] is None


def test_a_row_is_of_all_rounds() -> None:
    row, _ = rows_of("idle", HEALTH, [one_round(100, 1e-4, 30), one_round(50, 3e-4, 10)], [one_round(1, 1)] * 2)
    assert row["requests"] == 40
    assert row["requests/s"] == pytest.approx(40 / 0.5)
    assert row["server CPU µs"] == pytest.approx((30 * 100 + 10 * 300) / 40)
    assert [row[f"{name} ms"] for name in ("p50", "p90", "p99", "max")] == pytest.approx([10, 20, 20, 20])


def test_cpu_seconds_are_those_of_the_process() -> None:
    before = time.process_time()
    between = cpu_seconds(os.getpid())
    assert before <= between <= time.process_time()


@pytest.mark.slow
def test_all_of_it(tiny_model: Path, benchmark_data: Path) -> None:
    few = ["--documents", 4, "--rounds", 1, "--requests", 6, "--submissions", 2, "--connections", 2, "--seconds", 600]
    command = [sys.executable, ROOT / "scripts" / "bench_api.py", "--json", "--model", tiny_model, *few]
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    document = json.loads(ran.stdout)
    assert document["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert document["facts"]["load generator alone, requests/s"] > 0
    rows = document["rows"]
    assert len(rows) == 36  # nine endpoints, idle and under load, two servers
    assert {(row["state"], row["server"]) for row in rows} == {
        (state, server) for state in ("idle", "under load") for server in ("evalpool", "FastAPI")
    }
    assert all(row["requests"] == (2 if "cached" in row["endpoint"] else 6) for row in rows)
    assert all(0 < row["p50 ms"] <= row["p99 ms"] <= row["max ms"] for row in rows)
    assert all(row["server CPU µs"] >= 0 for row in rows)
    assert all(
        sum(row["server CPU µs"] for row in rows if row["server"] == name) > 0 for name in ("evalpool", "FastAPI")
    )

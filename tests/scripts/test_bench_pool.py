"""The benchmark of whole jobs: its arithmetic, and all of it once with few documents on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bare_engine import together
from bench_pool import Bare, Run, row
from chunks import generating, scoring

ROOT = Path(__file__).parents[2]
BARE = Bare(requests=100, tokens=3000, distinct_tokens=2000, seconds=10.0, cpu_seconds=8.0)


def run(seconds: float, workers: int = 2, gpu_utilisation: float | None = None) -> Run:
    return Run(seconds=seconds, workers=workers, worker_cpu_seconds=9.0, gpu_utilisation=gpu_utilisation)


def test_a_row_compares_the_median_with_the_bare_engine() -> None:
    found = row("jobs", [run(6.0), run(5.5), run(50.0)], BARE)
    assert (found["median s"], found["max s"], found["runs"]) == (6.0, 50.0, 3)
    assert found["requests/s"] == pytest.approx(100 / 6)
    assert found["s beyond bare"] == pytest.approx(6 - 10 / 2)
    assert found["rate / bare"] == pytest.approx(5 / 6)
    assert found["CPU / bare"] == pytest.approx(9 / 8)


def test_several_jobs_are_compared_with_as_many_of_the_bare_engine() -> None:
    found = row("jobs", [run(120.0, workers=1)], BARE, jobs=10)
    assert found["s beyond bare"] == pytest.approx(20)
    assert found["tokens/s"] == pytest.approx(10 * 3000 / 120)
    assert found["CPU / bare"] == pytest.approx(9 / 80)


def test_utilisation_is_that_of_the_gpus_where_there_are_any() -> None:
    assert run(6.0, workers=2).utilisation == pytest.approx(0.75)
    assert run(6.0, workers=2, gpu_utilisation=0.9).utilisation == 0.9


def test_the_bare_engine_gets_each_kind_of_request_at_once() -> None:
    short, long = {"max_gen_toks": 3}, {"max_gen_toks": 5}
    chunks = [
        scoring([((1, 2), (3,))]),
        generating([(1,)], **short),
        generating([(2,)], **long),
        scoring([((1, 2), (4, 5)), ((6,), (7,))]),
        generating([(3,), (4,)], **short),
    ]
    scored, *generated = together(chunks)
    assert scored == scoring([((1, 2), (3,)), ((1, 2), (4, 5)), ((6,), (7,))], 0)
    assert generated == [generating([(1,), (3,), (4,)], 1, **short), generating([(2,)], 2, **long)]


@pytest.mark.slow
def test_all_of_it(tiny_model: Path, benchmark_data: Path) -> None:
    few = ["--limit", 12, "--workers", 1, 2, "--runs", 1, "--tasks", "piqa", "gsm8k", "--max-gen-toks", 4]
    command = [sys.executable, ROOT / "scripts" / "bench_pool.py", "--json", "--model", tiny_model, *few]
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    rows = json.loads(ran.stdout)["rows"]
    assert [(row["what"], row["workers"]) for row in rows] == [
        ("8 documents, cold", 1),
        ("8 documents, warm", 1),
        ("10 jobs of 8 documents", 1),
        ("8 documents, from the cache", 1),
        ("12 documents", 1),
        ("12 documents", 2),
        ("bare engine, small job", 1),
        ("bare engine, large job", 1),
    ]
    for computed in rows[:3] + rows[4:6]:
        assert computed["median s"] > 0
        assert computed["utilisation"] > 0
        assert computed["distinct tokens/s"] <= computed["tokens/s"]
    assert rows[4]["speed-up"] == 1

"""The benchmark of faults: its arithmetic, and all of it once on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_faults import row

ROOT = Path(__file__).parents[2]


def test_the_percentile_is_the_nearest_rank() -> None:
    found = row("cancel", [float(second) for second in range(200, 0, -1)])
    assert (found["runs"], found["median s"], found["99th percentile s"]) == (200, 100.5, 198.0)
    assert row("cancel", [3.0])["99th percentile s"] == 3.0


@pytest.mark.slow
def test_all_of_it(tiny_model: Path, benchmark_data: Path) -> None:
    few = ["--limit", 600, "--max-gen-toks", 60, "--runs", 1, "--cancels", 2]
    command = [sys.executable, ROOT / "scripts" / "bench_faults.py", "--json", "--model", tiny_model, *few]
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    report = json.loads(ran.stdout)
    assert [row["runs"] for row in report["rows"]] == [1, 1, 2]
    assert all(row["median s"] > 0 for row in report["rows"])
    assert report["facts"]["answers shown before the crashes"] > 0

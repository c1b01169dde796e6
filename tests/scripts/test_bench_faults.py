"""The benchmark of faults: its arithmetic, and all of it once on a tiny model."""

from __future__ import annotations

import json
import os
import select
import signal
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


def test_when_it_is_told_to_end_it_takes_its_server_along(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from pathlib import Path
from bench_faults import running
with running(Path({str(tmp_path)!r}), {{}}, "--cpu-workers", 1) as service:
    print(service.process.pid, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as bench:
        assert bench.stdout is not None
        server = os.pidfd_open(int(bench.stdout.readline()))
        bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM
    ended, _, _ = select.select([server], [], [], 60)
    os.close(server)
    assert ended


@pytest.mark.slow
def test_all_of_it(tiny_model: Path, benchmark_data: Path) -> None:
    few = ["--limit", 1000, "--runs", 1, "--cancels", 2]
    command = [sys.executable, ROOT / "scripts" / "bench_faults.py", "--json", "--model", tiny_model, *few]
    ran = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    report = json.loads(ran.stdout)
    assert [row["runs"] for row in report["rows"]] == [1, 2, 1]
    assert all(row["median s"] > 0 for row in report["rows"])
    facts = report["facts"]
    assert facts["requests with a durable answer at the crashes"] > 0
    assert facts["requests recomputed"] == facts["requests in flight"] > 0

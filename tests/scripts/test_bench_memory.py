"""The benchmark of memory, once, on small jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_memory import memory_mib

ROOT = Path(__file__).parents[2]


HOLDER = "print(flush=True); input(); held = bytearray(b'x') * (64 << 20); print(flush=True); input()"


def test_memory_of_a_process_grows_with_what_it_holds() -> None:
    """A process of its own: what the one of the tests holds and shares changes with whatever runs beside it."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdout.readline()  # it has started
        before = memory_mib(holder.pid)
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        holder.stdout.readline()
        assert 60 < memory_mib(holder.pid) - before < 90
        holder.stdin.write(b"\n")
    assert holder.returncode == 0


@pytest.mark.slow
def test_all_of_it() -> None:
    few = ["--documents", "1000", "--images", "0", "--every", "0.1"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), "--json", *few]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    rows = json.loads(ran.stdout)["rows"]
    assert [(row["job"], row["process"]) for row in rows] == [("questions", "worker"), ("questions", "evaluator")]
    assert any(value and value > 50 for row in rows for name, value in row.items() if name.endswith("%"))

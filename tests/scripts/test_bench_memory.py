"""The benchmark of memory, once, on small jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_memory import memory_mib

ROOT = Path(__file__).parents[2]


def test_memory_of_a_process_grows_with_what_it_holds() -> None:
    before = memory_mib(os.getpid())
    held = bytearray(os.urandom(64 << 20))
    assert 60 < memory_mib(os.getpid()) - before < 90
    del held


@pytest.mark.slow
def test_all_of_it() -> None:
    few = ["--documents", "400", "--images", "0"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_memory.py"), "--json", *few]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    rows = json.loads(ran.stdout)["rows"]
    assert [(row["job"], row["process"]) for row in rows] == [("questions", "worker"), ("questions", "evaluator")]
    assert any(value and value > 50 for row in rows for name, value in row.items() if name.endswith("%"))

"""The engine's benchmark, on a few documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_engine.py"
WORKLOADS = ("mmlu 5-shot", "gsm8k 5 random shots", "rolling perplexity", "deep tree", "distinct prompts")
GENERATION = {"gsm8k 5 random shots", "distinct prompts"}


def bench(model: Path, *options: object) -> dict[str, Any]:
    few = ["--rounds", 1, "--share", 0.04, "--hf-batch-sizes", 1]
    command = [str(word) for word in (sys.executable, SCRIPT, "--model", model, *few, "--json", *options)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(run.stdout[run.stdout.index("{\n") :])


@pytest.mark.slow
def test_each_kind_of_workload(tiny_model: Path, benchmark_data: Path) -> None:
    options = ["--max-length", 2048, "--deterministic", "--generate-batch", 2]
    report = bench(tiny_model, *options, "--workloads", *WORKLOADS)
    assert report["facts"]["memory bandwidth, GB/s"] > 0
    rows = report["rows"]
    assert [row["workload"] for row in rows] == list(WORKLOADS)
    for row in rows:
        assert row["ratio"] > 0
        assert row["ours % of limit"] > 0
        assert row["deterministic costs"] > 0
        assert row["ours tokens"] <= row["HF tokens"]
        assert row.get("max Δ logp", 0.0) <= 1e-5
        assert row.get("picks differ", "0").startswith("0")
        assert row.get("texts differ", "0").startswith("0")
        assert ("ratio to generate_batch" in row) == (row["workload"] in GENERATION)
        assert row.get("generate_batch: texts differ", "0").startswith("0")


@pytest.mark.slow
def test_generation_without_generate_batch(tiny_model: Path, benchmark_data: Path) -> None:
    report = bench(tiny_model, "--max-length", 2048, "--selection", "short", "--workloads", "gsm8k 5 fixed shots")
    [row] = report["rows"]
    assert row["texts differ"].startswith("0")
    assert "ratio to generate_batch" not in row
    assert "generate_batch" not in report["facts"]


@pytest.mark.slow
def test_half_precision_is_compared_with_full(tiny_model: Path, benchmark_data: Path) -> None:
    [row] = bench(tiny_model, "--max-length", 2048, "--dtype", "bfloat16", "--workloads", "mmlu 5-shot")["rows"]
    assert 0 < row["ours: rms Δ to fp32"] < 2 * row["HF: rms Δ to fp32"]
    assert row["HF alone: max Δ logp"] >= 0

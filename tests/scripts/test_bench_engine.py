"""The engine's benchmark, on a few documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_engine import spread
from lm_eval.api.instance import Instance
from machine import describe_machine

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
    options = ["--max-length", 2048, "--deterministic", "--profile", "--generate-batch", 2]
    report = bench(tiny_model, *options, "--workloads", *WORKLOADS)
    assert report["facts"]["memory bandwidth, GB/s"] > 0
    rows = report["rows"]
    assert [row["workload"] for row in rows] == list(WORKLOADS)
    for row in rows:
        assert row["ratio"] > 0
        assert row["ours % of limit"] > 0
        assert row["deterministic costs"] > 0
        assert sum(share for name, share in row.items() if name.startswith("ours, % in")) == pytest.approx(100)
        assert row["ours, % in matrix products"] > 0
        assert row["ours, % in attention"] > 0
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
@pytest.mark.skipif(
    not {"avx512_bf16", "amx_bf16", "bf16"} & set(describe_machine().instruction_sets),
    reason="this CPU has no bf16: its products take minutes",
)
def test_half_precision_is_compared_with_full(tiny_model: Path, benchmark_data: Path) -> None:
    options = ["--max-length", 2048, "--dtype", "bfloat16", "--workloads", "hellaswag 0-shot", "--hf-batch-sizes", 1, 2]
    [row] = bench(tiny_model, *options)["rows"]
    assert 0 < row["ours: rms Δ to fp32"] < 2 * row["HF: rms Δ to fp32"]
    for side in ("", "HF alone: "):
        assert 0 < row[f"{side}rms Δ logp"] <= row[f"{side}max Δ logp"]
        assert row[f"{side}picks differ"].endswith(row["picks differ"].split()[-1])


def choices(documents: int) -> list[Instance]:
    """Two choices of each document."""
    return [
        Instance("loglikelihood", {}, ("", ""), number, metadata=("task", document, 1))
        for document in range(documents)
        for number in range(2)
    ]


def test_spread_is_over_all_of_the_others() -> None:
    """Of two others, the first differs in one value, the second in two, which make another choice the best."""
    requests = choices(2)
    keys = [("task", document, number) for document in range(2) for number in range(2)]
    reference = [(-4.0, False), (-2.0, False), (-1.0, False), (-10.0, False)]

    def other(*values: float) -> dict[tuple[str, int, int], tuple[float, bool]]:
        return dict(zip(keys, ((value, False) for value in values), strict=True))

    first, second = other(-4.4, -2.0, -1.0, -10.0), other(-1.0, -2.0, -1.0, -8.0)
    found = spread(requests, reference, [first, second])
    assert found["max Δ logp"] == pytest.approx(0.75)
    assert found["rms Δ logp"] == pytest.approx(((0.1**2 + 0.75**2 + 0.2**2) / 8) ** 0.5)
    assert found["picks differ"] == "1 of 2"
    assert spread(requests, reference, []) == {}


def test_spread_of_texts() -> None:
    requests = [Instance("generate_until", {}, ("", {}), 0, metadata=("task", number, 1)) for number in range(12)]
    texts = [str(number) for number in range(12)]
    others = [{("task", number, 0): "" if number < many else str(number) for number in range(12)} for many in (2, 11)]
    assert spread(requests, texts, others) == {"texts differ": "11 of 12"}

"""The benchmark of models that read images, once, on a trained one and few documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_all_of_it() -> None:
    few = ["--documents", "6", "--rounds", "1", "--hf-batch-sizes", "1", "2"]
    command = [sys.executable, str(ROOT / "scripts" / "bench_multimodal.py"), "--json", *few]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    generation, choice = json.loads(ran.stdout)["rows"]
    assert generation["texts differ"] == "0 of 6"
    assert generation["HF batch"] in (1, 2)
    assert 0 < generation["image tokens/s"] < generation["prompt tokens/s"]
    assert all(row["ours docs/s"] > 0 and row["ours CPU s/doc"] > 0 for row in (generation, choice))

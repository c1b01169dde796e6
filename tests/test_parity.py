"""Scores and answers equal those of lm-eval's HF backend on a real model and stock tasks; small limits.

`scripts/bench_parity.py` is the same with large ones.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from bench_parity import CASES, difference, our_answers, reference_answers
from evalpool_server import run_server

from server.client import EvalClient

pytestmark = pytest.mark.slow

SMALL = {name: {**case, "limit": 2} for name, case in CASES.items()}
SMALL["gsm8k 5-shot"]["gen_kwargs"] = {"max_gen_toks": 12}


@pytest.fixture(scope="module")
def reference(smollm2: Path, benchmark_data: Path) -> dict[str, Any]:
    """lm-eval's own answers to all cases."""
    return reference_answers(smollm2, benchmark_data / "dataset_roots.toml", SMALL)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, benchmark_data: Path) -> Generator[EvalClient]:
    """A client of a server with two CPU workers."""
    folder = tmp_path_factory.mktemp("parity")
    options = ("--cpu-workers", 2, "--config", benchmark_data / "dataset_roots.toml")
    with run_server(folder / "data", *options) as server, EvalClient(server.url) as client:
        yield client


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (7, 2), ("auto", 2)])
@pytest.mark.parametrize("name", SMALL)
def test_answers_equal_the_hf_backends(
    name: str,
    batch_size: int | str,
    workers: int,
    reference: dict[str, Any],
    client: EvalClient,
    smollm2: Path,
) -> None:
    ours = our_answers(client, smollm2, SMALL[name], batch_size, workers)
    found = difference(reference[name], ours)
    assert found.acceptable, found
    assert 1 <= len(ours["workers"]) <= workers


def test_a_difference_is_seen() -> None:
    reference = {"samples": {"t": {"0": [[[-10.0, True]]]}}, "results": {"t": {"acc,none": 1.0}}}
    same = {"samples": {"t": {"0": [[["-10.00005", "True"]]]}}, "results": {"t": {"acc,none": 1.0}}}
    assert difference(reference, same).acceptable
    for other in ([[["-10.0002", "True"]]], [[["-10.0", "False"]]]):
        assert not difference(reference, {**same, "samples": {"t": {"0": other}}}).acceptable
    assert not difference(reference, {**same, "results": {"t": {"acc,none": 0.9}}}).acceptable

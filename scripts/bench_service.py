"""What the service costs beyond the model: warm small jobs, a sweep of them, and /health while all of it runs.

Prints, for 8 documents of PIQA on SmolLM2-135M (or --model): seconds from POST to completed of the first job (cold), of
further ones (warm, response cache off), of one answered from the cache (the service alone), and of ten submitted at
once; then the latency of /health while jobs run, /tasks is asked for and a job is submitted every 100 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fetch_real_data
import httpx
from local_server import running_server
from rich.console import Console
from rich.table import Table

from server.client import EvalClient

POLL_SECONDS = 0.02
SUBMIT_EVERY_SECONDS = 0.1


def main() -> int:
    arguments = parse_arguments()
    model = str(arguments.model or fetch_real_data.smollm2())
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    job = {"model": model, "tasks": ["piqa"], "limit": 8, "use_cache": False}
    table = Table("What", "Times", "Median s", "Max s")
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--config", config, "--cpu-workers", arguments.workers) as url,
        EvalClient(url) as client,
    ):
        add(table, "first job, cold", [timed(client, [job])])
        add(table, "job on a warm model", [timed(client, [job]) for _ in range(arguments.jobs)])
        timed(client, [{**job, "use_cache": True}])
        cached = [timed(client, [{**job, "use_cache": True}]) for _ in range(arguments.jobs)]
        add(table, "the same from the response cache", cached)
        add(table, "sweep of 10, a job", [timed(client, [job] * 10) / 10])
        health = health_under_load(url, client, job, arguments.seconds)
        add(table, "GET /health under load", health)
    Console().print(table)
    print(f"/health under load: 99th percentile {quantile(health, 0.99) * 1000:.1f} ms of {len(health)} requests")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--workers", type=int, default=1, help="CPU workers")
    parser.add_argument("--jobs", type=int, default=5, help="repetitions of each job")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long /health is watched")
    return parser.parse_args()


def timed(client: EvalClient, requests: list[dict[str, Any]]) -> float:
    """Seconds from the first POST to the last completion."""
    started = time.perf_counter()
    submitted = [client.evaluate(**request)["job_id"] for request in requests]
    for job_id in submitted:
        job = client.wait_for_job(job_id, poll_interval=POLL_SECONDS, verbose=False)
        if job["status"] != "completed":
            raise RuntimeError(f"job {job_id} is {job['status']}: {job['error']}")
    return time.perf_counter() - started


def health_under_load(url: str, client: EvalClient, job: dict[str, Any], seconds: float) -> list[float]:
    """Latencies of /health, asked again and again while others keep the server busy."""
    stop = threading.Event()

    def submit() -> None:
        with EvalClient(url) as other:
            jobs: list[str] = []
            while not stop.wait(SUBMIT_EVERY_SECONDS):
                jobs.append(other.evaluate(**job)["job_id"])
            for job_id in reversed(jobs):
                cancel(other, job_id)

    def list_tasks() -> None:
        with EvalClient(url) as other:
            while not stop.is_set():
                other.list_tasks()

    others = [threading.Thread(target=work) for work in (submit, list_tasks)]
    for other in others:
        other.start()
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds
    while (started := time.perf_counter()) < deadline:
        client.health()
        latencies.append(time.perf_counter() - started)
        time.sleep(0.01)
    stop.set()
    for other in others:
        other.join()
    return latencies


def cancel(client: EvalClient, job_id: str) -> None:
    """Cancel unless it has ended."""
    try:
        client.cancel_job(job_id)
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.BAD_REQUEST:
            raise


def quantile(values: list[float], share: float) -> float:
    """The value below which that share of `values` lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def add(table: Table, name: str, seconds: list[float]) -> None:
    table.add_row(name, str(len(seconds)), f"{statistics.median(seconds):.3f}", f"{max(seconds):.3f}")


if __name__ == "__main__":
    sys.exit(main())

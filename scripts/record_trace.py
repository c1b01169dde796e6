"""Write a trace for bench_scheduler.py from the data folder of a real server: its completed jobs as they were.

A job's submission, preparation and scoring, the chunks that workers computed for it and their time come from
jobs.sqlite and from the job's log; a model's loading time and number of GPUs from the workers' logs. CPU workers count
as GPUs. Jobs that failed or were cancelled are left out, and so are those of servers that did not log chunks.
"""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sim_traces import TraceJob, TraceModel, make_trace, write_trace

TIME = r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) "
STARTING = re.compile(TIME + r"starting with (?P<slots>\d+) slots for (?P<fingerprint>\S+)$")
LOADED = re.compile(TIME + r"loaded (?P<fingerprint>\S+)$")
JOB_LINE = re.compile(TIME + r"INFO +gpu_pool\.evaluator\.job: (?P<said>.*)$")


class Loading(NamedTuple):
    """One time that a worker loaded a model."""

    seconds: float
    slots: int


def main() -> int:
    """0 when there was a job to write, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="that of `evalpool serve`, which may be running")
    parser.add_argument("trace", type=Path, help="the file to write, as JSON lines")
    parser.add_argument("--load-seconds", type=float, default=10.0, help="of models whose loading no log tells of")
    arguments = parser.parse_args()
    found = loadings(arguments.data_dir / "logs")
    rows = completed_jobs(arguments.data_dir / "jobs.sqlite")
    jobs: list[TraceJob] = []
    models: dict[str, TraceModel] = {}
    for row in rows:
        if (job := traced(row, arguments.data_dir / "jobs" / row["id"] / "job.log", rows[0]["created_at"])) is None:
            continue
        times = found.get(row["model"]["fingerprint"], [])
        load_s = statistics.median(time.seconds for time in times) if times else arguments.load_seconds
        models[job.model] = TraceModel(
            name=job.model, load_s=round(load_s, 3), gpus=max((time.slots for time in times), default=1)
        )
        jobs.append(job)
    print(
        f"{len(jobs)} of {len(rows)} completed jobs on {len(models)} models; {len(found)} models' loading is recorded"
    )
    if jobs:
        took_s = _seconds(rows[0]["created_at"], max(row["completed_at"] for row in rows))
        print(f"from the first submission to the last completion: {took_s:g} s")
        write_trace(make_trace(arguments.trace.stem, list(models.values()), jobs), arguments.trace)
    return 0 if jobs else 1


def loadings(logs: Path) -> dict[str, list[Loading]]:
    """By fingerprint, every loading that the workers' logs tell of; a log may be that of several workers in turn."""
    found: defaultdict[str, list[Loading]] = defaultdict(list)
    for log in sorted(logs.glob("worker-*.log")):
        begun: re.Match[str] | None = None
        for line in log.read_text(errors="replace").splitlines():
            if starting := STARTING.match(line):
                begun = starting
            elif (loaded := LOADED.match(line)) and begun and loaded["fingerprint"] == begun["fingerprint"]:
                seconds = (_local(loaded["time"]) - _local(begun["time"])).total_seconds()
                found[loaded["fingerprint"]].append(Loading(seconds, int(begun["slots"])))
    return found


def completed_jobs(database: Path) -> list[dict[str, Any]]:
    """Rows of the completed evaluations, oldest first, their times as datetimes. Raises FileNotFoundError."""
    if not database.is_file():
        raise FileNotFoundError(
            f"{database} is not there: is it the data folder of a server that keeps jobs in SQLite?"
        )
    columns = ("id", "created_at", "started_at", "completed_at", "work", "model")
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        query = (
            f"SELECT {', '.join(columns)} FROM jobs WHERE state = 'completed' AND model IS NOT NULL ORDER BY created_at"
        )
        rows = [dict(zip(columns, values, strict=True)) for values in connection.execute(query)]
    finally:
        connection.close()
    for row in rows:
        for name in ("created_at", "started_at", "completed_at"):
            row[name] = datetime.fromisoformat(row[name]).replace(tzinfo=UTC)
        for name in ("work", "model"):
            row[name] = json.loads(row[name])
    return rows


def traced(row: dict[str, Any], log: Path, begin: datetime) -> TraceJob | None:
    """What the job's log says of its last attempt, or None where it does not say what was computed."""
    asked = answered = None
    computed: dict[str, tuple[int, float]] | None = None
    for time, said in _said(log, row["started_at"]):
        if "; asking " in said:
            asked = asked or time
        elif said.endswith(": answered"):
            answered = time
        elif said.startswith("computed: "):
            computed = json.loads(said.removeprefix("computed: "))
    if computed is None or asked is None or answered is None:
        return None
    chunks = sum(count for count, _ in computed.values())
    seconds = sum(seconds for _, seconds in computed.values())
    evaluation, model = row["work"], row["model"]
    return TraceJob(
        id=row["id"],
        arrival_s=_seconds(begin, row["created_at"]),
        model=f"{Path(model['args']['pretrained']).name}-{model['fingerprint'][-8:]}",
        chunks=chunks,
        chunk_s=round(seconds / chunks, 4) if chunks else 0.0,
        prepare_s=_seconds(row["started_at"], asked),
        score_s=_seconds(answered, row["completed_at"]),
        num_gpus=max(1, evaluation.get("num_gpus", 1)),
        priority=evaluation.get("priority", 0),
    )


def _said(log: Path, since: datetime) -> Iterator[tuple[datetime, str]]:
    """What the evaluator logged of the attempt that started then; earlier ones are in the same file."""
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        if (match := JOB_LINE.match(line)) and _seconds(since, time := _local(match["time"])) >= 0:
            yield time, match["said"]


def _local(time: str) -> datetime:
    """A time as `logging` writes it: that of this machine."""
    return datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f").astimezone()


def _seconds(since: datetime, until: datetime) -> float:
    return round((until - since).total_seconds(), 3)


if __name__ == "__main__":
    sys.exit(main())

"""Traces from what a server leaves behind: from lines of its logs, and once from a real server's folder."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import record_trace
from evalpool_server import Serve
from service import Service, write_tasks
from sim_traces import TraceJob, read_trace
from sim_world import World

from gpu_pool.scheduler import Scheduler

ROOT = Path(__file__).parents[2]
JOB_LOG = """\
2026-11-24 10:00:01,000 INFO    gpu_pool.evaluator.job: piqa: 64 requests, 0 cached; asking 64 (7617 tokens)
2026-11-24 10:00:02,000 INFO    gpu_pool.evaluator.job: computed: {"worker-1": [9, 9.0]}
2026-11-24 10:00:12,250 INFO    gpu_pool.evaluator.job: piqa: 64 requests, 0 cached; asking 64 (7617 tokens)
2026-11-24 10:00:12,500 INFO    gpu_pool.evaluator.job: piqa: 336 requests, 0 cached; asking 336 (41487 tokens)
something that a library printed
2026-11-24 10:00:19,000 INFO    gpu_pool.evaluator.job: piqa: answered
2026-11-24 10:00:20,000 INFO    gpu_pool.evaluator.job: piqa: {'acc,none': 0.5}
2026-11-24 10:00:21,000 INFO    gpu_pool.evaluator.job: computed: {"worker-4": [3, 2.5], "worker-5": [5, 3.5]}
"""


def at(seconds: float) -> datetime:
    """So long after ten o'clock of that day, where this runs."""
    return datetime(2026, 11, 24, 10, 0, int(seconds), int(seconds % 1 * 1e6)).astimezone()


def row(**fields: Any) -> dict[str, Any]:
    usual = {"id": "j", "created_at": at(5), "started_at": at(12), "completed_at": at(22)}
    model = {"args": {"pretrained": "/models/mine"}, "fingerprint": "0123456789abcdef"}
    return usual | {"work": {"num_gpus": 2, "priority": 1}, "model": model} | fields


def test_a_job_is_what_its_last_attempt_took(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    log.write_text(JOB_LOG)
    assert record_trace.traced(row(), log, at(3)) == TraceJob(
        id="j",
        arrival_s=2.0,
        model="mine-89abcdef",
        chunks=8,
        chunk_s=0.75,
        prepare_s=0.25,
        score_s=3.0,
        num_gpus=2,
        priority=1,
    )


def test_a_job_whose_log_does_not_say_what_was_computed_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    assert record_trace.traced(row(), log, at(3)) is None
    log.write_text(JOB_LOG)
    assert record_trace.traced(row(started_at=at(13)), log, at(3)) is None


def test_loading_is_timed_by_the_logs_of_workers(tmp_path: Path) -> None:
    (tmp_path / "worker-1.log").write_text(
        "2026-11-24 10:00:00,000 starting with 2 slots for abc\n"
        "engine: tree route\n"
        "2026-11-24 10:00:07,500 loaded abc\n"
        "2026-11-24 11:00:00,000 starting with 1 slots for def\n"  # and ended before it had loaded
        "2026-11-24 12:00:00,000 starting with 1 slots for abc\n"
        "2026-11-24 12:00:03,000 loaded abc\n"
    )
    assert record_trace.loadings(tmp_path) == {"abc": [(7.5, 2), (3.0, 1)]}


@pytest.mark.slow
def test_a_real_servers_folder_becomes_a_trace_that_can_be_run(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    server = serve("--include-path", write_tasks(tmp_path / "tasks"), "--cpu-workers", 2)
    with Service(server) as service:
        submitted = [service.submit(tiny_model, "quick_choice", limit=limit, num_gpus=2) for limit in (20, 40)]
        for job_id in submitted:
            service.finished(job_id)
    file = tmp_path / "real.jsonl"
    command = [sys.executable, ROOT / "scripts" / "record_trace.py", server.data_dir, file]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert said.startswith("2 of 2 completed jobs on 1 models; 1 models' loading is recorded\n")
    trace = read_trace(file)
    assert [job.id for job in trace.jobs] == submitted
    assert all(job.chunks > 0 and job.chunk_s > 0 and job.num_gpus == 2 for job in trace.jobs)
    [model] = trace.models.values()
    assert model.load_s > 0
    world = World(trace, 2, Scheduler(evaluators=3, max_attempts=3))
    world.run(until_s=1000)
    assert {record.outcome for record in world.jobs.values()} == {"completed"}

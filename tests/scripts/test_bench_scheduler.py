"""The benchmark of the scheduler: its rows, and that every scheduler brings every random trace to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_scheduler import MAX_ATTEMPTS, SCHEDULERS, random_faults
from sim_random_traces import PATTERNS, random_trace
from sim_world import World

from gpu_pool.scheduler import Scheduler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_job_ends_once_and_computes_what_it_has_to(scheduler: str, pattern: str) -> None:
    trace = random_trace(pattern, 60, 8, seed=3)
    world = World(trace, 8, SCHEDULERS[scheduler](10))
    world.run(until_s=1e6)
    assert {record.outcome for record in world.jobs.values()} == {"completed"}
    ends = [record.ended_s or 0.0 for record in world.jobs.values()]
    assert max(ends) >= trace.bound_s(8)
    used = world.meter.total
    assert used.computing >= sum(map(trace.work_s, trace.jobs)) - 1e-6
    assert used.computing + used.loading <= used.usable <= 8 * max(ends) + 1e-6


def test_our_books_are_right_at_every_step_while_workers_die_and_gpus_are_lost() -> None:
    class Checked(Scheduler):
        def step(self, event):
            actions = super().step(event)
            self.ledger.check()
            return actions

    trace = random_trace("checkpoints", 60, 4, seed=5)
    faults = random_faults(trace.bound_s(4), 4, per_gpu_hour=30, seed=5)
    assert len(faults) > 10
    assert any(fault.lost_s for fault in faults)
    world = World(trace, 4, Checked(evaluators=6, max_attempts=MAX_ATTEMPTS), faults=faults)
    world.run(until_s=1e6)
    assert {record.outcome for record in world.jobs.values()} <= {"completed", "failed"}
    for record in world.jobs.values():
        assert (record.done == record.trace.chunks) == (record.outcome == "completed")


def test_all_of_it() -> None:
    small = ["--jobs", "30", "--gpus", "2", "--patterns", "few-models", "--history", "20"]
    command = [sys.executable, ROOT / "scripts" / "bench_scheduler.py", "--json", *small]
    ran = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=ROOT)
    document = json.loads(ran.stdout)
    assert document["machine"]["commit"]
    ours, fifo, one, before, after = document["rows"]
    assert [row["scheduler"] for row in (ours, fifo, one)] == list(SCHEDULERS)
    assert 1 <= ours["makespan / bound"] < fifo["makespan / bound"] < one["makespan / bound"]
    assert one["ended"] == "all"
    assert ours["median ms"] > 0
    assert before["decisions"] > 0
    assert after["decisions"] > 0

"""The pool before its processes are ready; with them it is tested as a service (tests/test_service*.py)."""

from __future__ import annotations

import contextlib
import sqlite3
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpu_pool.errors import PoolError
from gpu_pool.history import Attempt
from gpu_pool.pool import Pool
from gpu_pool.records import Evaluation, Job, JobState
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.views import QueueView


async def test_a_folder_of_tasks_must_exist(tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path / "data", include_paths=(tmp_path, tmp_path / "nope"))
    with pytest.raises(PoolError, match=r"include_paths: there is no such folder: .*/nope$"):
        await Pool(settings).start()


async def test_what_was_left_is_ended_or_waits_again(tiny_model: Path, tmp_path: Path) -> None:
    settings = PoolSettings(data_dir=tmp_path, cpu_workers=1, evaluators=1)
    store = await Store.open(tmp_path / "jobs.sqlite")
    evaluation = Evaluation(model=str(tiny_model), tasks=("t",), device="cpu")
    begun = Attempt(number=1, started_at=datetime.now(UTC))
    for job_id, state in (("stopping", JobState.CANCELLING), ("running", JobState.RUNNING)):
        job = Job(id=job_id, work=evaluation, request={}, created_at=begun.started_at, attempt=1)
        await store.add(job)
        assert await store.change_state(job_id, JobState.QUEUED, state, begun)
    await store.close()

    pool = Pool(settings)
    await pool.start()
    assert (await pool.job("stopping")).state is JobState.CANCELLED
    assert pool.queue() == QueueView(queued=("running",), running=(), completed=0, failed=0, cancelled=1)
    await pool.stop()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        rows = connection.execute("SELECT job_id, outcome, cause FROM attempts ORDER BY job_id").fetchall()
    assert rows == [("running", "requeued", "the server ended"), ("stopping", "cancelled", None)]

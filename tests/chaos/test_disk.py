"""A disk that is full and a database that somebody else holds: what can be said is said, and nothing is lost."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from chaos_box import Box
from conftest import OpenBox
from kill_points import Point
from outcomes import Outcome, outcome
from service import Service, until
from small_disk import full, mounted

from server.client import EvalError

DISK_BYTES = 64 << 20
OUTPUT_BYTES = 64 << 10
HELD_SECONDS = 3.0
"""Longer than SQLite waits for a lock by itself in one try."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A small one, for the data folder."""
    with mounted(tmp_path_factory.mktemp("disk"), DISK_BYTES) as folder:
        yield folder


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A tiny one, for results."""
    with mounted(tmp_path_factory.mktemp("output"), OUTPUT_BYTES) as folder:
        yield folder


@pytest.fixture(scope="module")
def box(disk: Path, output: Path, open_box: OpenBox) -> Generator[Box]:
    with open_box(data_dir=disk / "data", settings=f'output_roots = ["{output}"]\n') as box:
        yield box


@pytest.fixture(scope="module")
def quiet(box: Box) -> Outcome:
    return box.run()


def without_room(service: Service, job_id: str) -> dict[str, Any]:
    """The job as it is while it waits for room on a disk."""
    return service.job_once(job_id, lambda job: "make room" in (job["waits_for"] or ""), "it waits for room")


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_no_room_for_results(box: Box, output: Path, quiet: Outcome):
    """The job waits and says for what, and completes with what it has computed as soon as there is room."""
    box.settle()
    box.forget()
    service = box.service
    with full(output):
        job_id = box.submit(output_dir=str(output))
        job = without_room(service, job_id)
        assert job["waits_for"].startswith(f"No space left on device: '{output}/")
        assert job["status"] == "running"
        [waiting] = service.client.get_queue_status()["waiting"]
        assert (waiting["job_id"], waiting["reason"]) == (job_id, job["waits_for"])
        assert service.client.health()["trouble"] == f"job {job_id} waits: {job['waits_for']}"
        assert f"job {job_id} waits: No space left on device" in service.log()
    job = box.completed(job_id)
    assert (job["attempt"], job["waits_for"]) == (1, None)
    assert outcome(job) == quiet
    assert service.client.is_healthy()


@pytest.mark.slow
def test_who_waits_for_room_can_be_cancelled_and_timed_out(box: Box, output: Path):
    box.settle()
    before = files_in(output)
    with full(output):
        cancelled = box.submit(output_dir=str(output))
        without_room(box.service, cancelled)
        box.service.client.cancel_job(cancelled)
        assert box.ended(cancelled)["status"] == "cancelled"
        late = box.ended(box.submit(output_dir=str(output), timeout_s=5))
        assert (late["status"], late["error"]) == ("failed", "it ran for longer than its timeout_s of 5 s")
        assert "No space left" in (box.data_dir / "jobs" / late["job_id"] / "job.log").read_text()
    assert files_in(output) == before, "what they had begun to write is gone"


def refusal(box: Box, accepted: list[str]) -> EvalError | None:
    """What comes of one more job with a long record; None when the database's journal had room for it still."""
    try:
        accepted.append(box.service.submit(box.model, "chaos_choice", limit=1, system_instruction="x" * 100_000))
    except EvalError as error:
        return error
    return None


@pytest.mark.slow
def test_no_room_for_the_data_folder(box: Box, disk: Path, quiet: Outcome):
    """What comes in is refused with the reason, what runs ends with it or waits for room, and the server goes on."""
    box.settle()
    box.forget()
    box.control.arm(None)
    job_id, starts = box.submit(), box.starts
    accepted: list[str] = []
    until(lambda: Point("evaluator", "before answers", 1) in box.control.passages(), "it computes")
    with full(disk):
        refused = until(lambda: refusal(box, accepted), "there is no room for one more job")
        assert refused.response.status_code == 503
        assert f"the disk of {box.data_dir} is full; make room there" in refused.detail
        client, over = box.service.client, ("failed", "completed")

        def ended_or_waits() -> bool:
            """(What is written last may still find room, where something else is overwritten.)"""
            return client.get_job(job_id)["status"] in over or not client.is_healthy()

        until(ended_or_waits, "a change of state waits for room, or none is needed")
    for other in accepted:
        with contextlib.suppress(EvalError):  # it has ended
            client.cancel_job(other)
        box.service.ended(other)
    job = box.service.ended(job_id)
    if job["status"] == "failed":
        assert "No space left on device" in job["error"]
    else:
        assert outcome(job) == quiet
    assert box.run() == quiet
    assert box.service.client.is_healthy()
    assert box.starts == starts


@pytest.mark.slow
def test_somebody_holds_the_job_store(box: Box, quiet: Outcome):
    """A backup that takes longer than a lock is waited for."""
    box.settle()
    with contextlib.closing(
        sqlite3.connect(box.data_dir / "jobs.sqlite", isolation_level=None, check_same_thread=False)
    ) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(HELD_SECONDS, lambda: other.execute("COMMIT"))
        timer.start()
        assert box.run() == quiet
        timer.join()

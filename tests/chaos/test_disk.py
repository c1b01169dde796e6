"""A disk that is full and a database that somebody else holds: what can be said is said, and nothing is lost."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from chaos_box import Box
from conftest import OpenBox
from kill_points import Point
from outcomes import Outcome, outcome
from service import until
from small_disk import mounted

from server.client import EvalError

DISK_BYTES = 64 << 20
BLOCK = b"\0" * (1 << 16)
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
    with mounted(tmp_path_factory.mktemp("output"), len(BLOCK)) as folder:
        yield folder


@pytest.fixture(scope="module")
def box(disk: Path, output: Path, open_box: OpenBox) -> Generator[Box]:
    with open_box(data_dir=disk / "data", settings=f'output_roots = ["{output}"]\n') as box:
        yield box


@pytest.fixture(scope="module")
def quiet(box: Box) -> Outcome:
    return box.run()


@contextlib.contextmanager
def full(folder: Path) -> Generator[None]:
    """Nothing more can be written there meanwhile."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(BLOCK):
            pass
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.slow
def test_no_room_for_results(box: Box, output: Path):
    """The job fails and says why; the next one, with room, completes."""
    box.settle()
    with full(output):
        job = box.service.ended(box.submit(output_dir=str(output)))
        assert job["status"] == "failed"
        assert f"No space left on device: '{output}/" in job["error"]
        assert "make room there" in job["error"]
        assert [path for path in output.rglob("*") if path.is_file()] == [output / "filler"]
    box.completed(box.submit(output_dir=str(output)))


@pytest.mark.slow
def test_no_room_for_the_data_folder(box: Box, disk: Path, quiet: Outcome):
    """What comes in is refused with the reason, what runs ends with it or waits for room, and the server goes on."""
    box.settle()
    box.forget()
    box.control.arm(None)
    job_id, starts = box.submit(), box.starts
    until(lambda: Point("evaluator", "before answers", 1) in box.control.passages(), "it computes")
    with full(disk):
        with pytest.raises(EvalError) as refused:
            box.service.submit(box.model, "chaos_choice", limit=1)
        assert refused.value.response.status_code == 503
        assert f"the disk of {box.data_dir} is full; make room there" in refused.value.detail
        until(lambda: not box.service.client.is_healthy(), "a change of state waits for room")
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

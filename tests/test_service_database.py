"""The service and its database: on PostgreSQL, while another program has the file locked, on a full disk."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from evalpool_server import Serve, failing_serve
from postgres_server import PostgresServer
from service import Gate, Service, until, write_tasks
from small_disk import mounted

from server.client import EvalError

DISK_BYTES = 4 << 20


def test_jobs_on_postgresql_survive_a_crash(
    serve: Serve, postgres: PostgresServer, tiny_model: Path, tmp_path: Path
) -> None:
    url, data_dir = postgres.new_database(), tmp_path / "data"
    flags = ("--database", url, "--include-path", write_tasks(tmp_path / "tasks"), "--cpu-workers", 1)
    with Service(serve(*flags, data_dir=data_dir)) as before:
        done = before.submit(tiny_model, "quick_choice", limit=4, tags=["nightly"], idempotency_key="step 1")
        finished = before.finished(done)
        refused = failing_serve("--port", 0, "--data-dir", tmp_path / "other", "--database", url)
        assert "another server uses this database" in refused
        running = before.submit(tiny_model, "long_story", limit=400, use_cache=True)
        before.answering(running)
        before.server.kill()  # asserts that no process is left

    with Service(serve(*flags, data_dir=data_dir)) as after:
        assert after.job(done) == finished
        assert after.submit(tiny_model, "quick_choice", limit=4, tags=["nightly"], idempotency_key="step 1") == done
        with pytest.raises(EvalError, match="idempotency_key: was used before with another request") as caught:
            after.submit(tiny_model, "quick_choice", limit=5, tags=["nightly"], idempotency_key="step 1")
        assert caught.value.response.status_code == 409
        assert [job["job_id"] for job in after.client.jobs(tags=["nightly"])["jobs"]] == [done]
        resumed = after.finished(running)
        assert (resumed["attempt"], resumed["retries"]) == (2, 0)
        events = [(event["event"], event["attempt"]) for event in after.client.events(running)["events"]]
        assert events == [("submitted", 0), ("started", 1), ("requeued", 1), ("started", 2), ("completed", 2)]


def test_a_job_that_ends_while_the_database_is_locked(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "tasks")
    with Service(serve("--include-path", tmp_path / "tasks", "--cpu-workers", 1)) as service:
        running = service.submit(tiny_model, "gated_choice", limit=12)
        service.job_once(running, lambda job: job["status"] == "running", "it runs")
        database = service.server.data_dir / "jobs.sqlite"
        with locked(database):
            gate.open()
            health = until(lambda: degraded(service), "the job's end waits to be written")
            assert f"another process has {database} locked" in health
            assert service.job(running)["status"] == "running"
            with pytest.raises(EvalError, match="Nothing was changed") as caught:
                service.client.cancel_job(running)
            assert caught.value.response.status_code == 503
        job = service.finished(running)
        assert service.client.is_healthy()
        assert (job["attempt"], job["progress"]["done"]) == (1, 24)


def test_a_server_that_ends_while_the_database_is_locked(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    flags, data_dir = ("--include-path", write_tasks(tmp_path / "tasks"), "--cpu-workers", 1), tmp_path / "data"
    with Service(serve(*flags, data_dir=data_dir)) as before:
        running = before.submit(tiny_model, "long_story", limit=400, use_cache=True)
        before.answering(running)
        with locked(data_dir / "jobs.sqlite"):
            before.server.stop()  # asserts the exit status, the time and that no process is left
        database = data_dir / "jobs.sqlite"
        assert f"running jobs are left as they are: another process has {database} locked" in before.log()
    with Service(serve(*flags, data_dir=data_dir)) as after:
        job = after.finished(running)
        assert (job["attempt"], job["retries"], job["progress"]["done"]) == (2, 0, 400)


def test_a_full_disk(serve: Serve, tiny_model: Path, tmp_path: Path, small_disk: Path) -> None:
    flags = ("--include-path", write_tasks(tmp_path / "tasks"), "--cpu-workers", 1)
    with Service(serve(*flags, "--database", f"sqlite:///{small_disk}/jobs.sqlite")) as service:
        first = service.submit(tiny_model, "long_story", limit=12)
        service.answering(first)
        fill(small_disk / "ballast")
        with ThreadPoolExecutor() as thread:  # what the first job writes may still fit
            large = thread.submit(submit_large, service, tiny_model)
            health = until(lambda: degraded(service), "the disk is full")
            assert f"the disk of {small_disk} is full; make room there" in health
            (small_disk / "ballast").unlink()
        service.finished(first)
        service.finished(large.result())
        service.finished(service.submit(tiny_model, "quick_choice", limit=2))
        assert service.client.is_healthy()


def degraded(service: Service) -> str | None:
    return service.client.health()["trouble"]


def submit_large(service: Service, model: Path) -> str:
    """A job whose record takes room."""
    return service.submit(model, "quick_choice", limit=1, system_instruction="x" * 100_000)


def fill(path: Path) -> None:
    """Take all room that is left on a disk."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


@contextlib.contextmanager
def locked(path: Path) -> Generator[None]:
    """Another program has the database locked for writing."""
    with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path]:
    """A folder on a disk of its own of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with mounted(folder, DISK_BYTES):
        yield folder

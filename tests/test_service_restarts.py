"""Ends of the server in the middle of jobs, by crash and by request, and what the next one on its data folder makes."""

from __future__ import annotations

from pathlib import Path

from evalpool_server import Serve
from service import Service, write_tasks


def arguments(folder: Path) -> tuple[object, ...]:
    """Of a server on which one job runs at a time."""
    config = folder / "evalpool.toml"
    config.write_text("evaluators = 1\n")
    return ("--config", config, "--include-path", write_tasks(folder / "tasks"), "--cpu-workers", 1)


def test_a_crash_loses_nothing(serve: Serve, tiny_model: Path, tmp_path: Path):
    flags, data_dir = arguments(tmp_path), tmp_path / "data"
    with Service(serve(*flags, data_dir=data_dir)) as before:
        done = before.submit(tiny_model, "quick_choice", limit=4)
        finished = before.finished(done)
        samples = list(before.client.samples(done))
        running = before.submit(tiny_model, "long_story", limit=400, use_cache=True)
        queued = before.submit(tiny_model, "quick_choice", limit=4)
        before.answering(running)
        assert before.job(queued)["status"] == "queued"
        before.server.kill()  # asserts that no process is left

    with Service(serve(*flags, data_dir=data_dir)) as after:
        assert after.job(done) == finished
        assert list(after.client.samples(done)) == samples
        assert len(samples) == 4
        resumed = after.finished(running)
        assert resumed["attempt"] == 2
        assert resumed["progress"]["cached"] > 0
        assert resumed["progress"]["cached"] + sum(resumed["progress"]["workers"].values()) == 400
        assert after.client.samples_page(running)["total"] == 400
        assert after.finished(queued)["metrics"] == finished["metrics"]


def test_a_polite_end_puts_running_jobs_back(serve: Serve, tiny_model: Path, tmp_path: Path):
    flags, data_dir = arguments(tmp_path), tmp_path / "data"
    with Service(serve(*flags, data_dir=data_dir)) as before:
        cancelled = before.submit(tiny_model, "long_story", limit=3000)
        running = before.submit(tiny_model, "long_story", limit=400)
        before.answering(cancelled)
        before.client.cancel_job(cancelled)
        before.answering(running)
        before.server.stop()  # asserts the exit status, the time and that no process is left

    with Service(serve(*flags, data_dir=data_dir)) as after:
        assert after.job(running)["completed_at"] is None
        job = after.finished(running)
        assert (job["attempt"], job["progress"]["done"]) == (2, 400)
        assert after.job(cancelled)["status"] == "cancelled"

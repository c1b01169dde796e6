"""Ends of the server in the middle of jobs, by crash and by request, and what the next one on its data folder makes."""

from __future__ import annotations

import os
import select
from pathlib import Path

from evalpool_server import Serve
from service import PATIENCE_SECONDS, STORY, Service, until, write_task_files, write_tasks

OFFSPRING = """
import os, subprocess, time
from pathlib import Path

started = Path(__file__).with_name("started")

def tell(document):
    if not started.exists():
        pids = [
            os.getpid(),
            subprocess.Popen(["sleep", "1000"]).pid,
            subprocess.Popen(["sleep", "1000"], start_new_session=True).pid,
            subprocess.Popen(["sleep", "1000"], start_new_session=True, env={"PATH": os.environ["PATH"]}).pid,
            os.fork(),
        ]
        while not pids[-1]:
            time.sleep(60)
        started.with_name("starting").write_text(" ".join(map(str, pids)))
        started.with_name("starting").rename(started)
    return f"Tell me: {document['question']}"
"""


def arguments(folder: Path) -> tuple[object, ...]:
    """Of a server on which one job runs at a time."""
    config = folder / "evalpool.toml"
    config.write_text("evaluators = 1\n")
    return ("--config", config, "--include-path", write_tasks(folder / "tasks"), "--cpu-workers", 1)


def write_breeding_task(folder: Path) -> Path:
    """`breeding_story`: its code starts processes that would live for ever; the file `started` names them."""
    write_task_files(
        folder, {"breeding_story": STORY.replace('"Tell me: {{question}}"', "!function offspring.tell")}, 1
    )
    (folder / "offspring.py").write_text(OFFSPRING)
    return folder


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


def test_what_the_code_of_a_task_started_dies_with_a_killed_server(serve: Serve, tiny_model: Path, tmp_path: Path):
    tasks = write_breeding_task(tmp_path / "tasks")
    with Service(serve("--include-path", tasks, "--cpu-workers", 1)) as service:
        service.submit(tiny_model, "breeding_story")
        until((tasks / "started").exists, "it has started processes")
        left = [os.pidfd_open(int(pid)) for pid in (tasks / "started").read_text().split()]
        service.server.kill()  # asserts that no process is left, as far as its environment tells
    for descriptor in left:
        assert select.select([descriptor], [], [], PATIENCE_SECONDS)[0]
        os.close(descriptor)


def test_a_polite_end_puts_running_jobs_back(serve: Serve, tiny_model: Path, tmp_path: Path):
    flags, data_dir = arguments(tmp_path), tmp_path / "data"
    with Service(serve(*flags, data_dir=data_dir)) as before:
        cancelled = before.submit(tiny_model, "long_story", limit=3000)
        running = before.submit(tiny_model, "long_story", limit=400)
        before.answering(cancelled)
        before.client.cancel_job(cancelled)
        before.answering(running)
        before.server.stop()  # asserts the exit status, the time and that no process is left
        assert "leaked" not in before.server.log.read_text()  # what multiprocessing says of semaphores

    with Service(serve(*flags, data_dir=data_dir)) as after:
        assert after.job(running)["completed_at"] is None
        job = after.finished(running)
        assert (job["attempt"], job["progress"]["done"]) == (2, 400)
        assert after.job(cancelled)["status"] == "cancelled"

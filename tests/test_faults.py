"""The whole service under what goes wrong: real servers, workers and evaluators that are killed, stopped and cancelled.

Nothing sleeps for luck: each test waits until the API shows the state that it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from evalpool_server import Server, run_server

from server.client import EvalClient

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 90.0
POLL_SECONDS = 0.02
DOCUMENTS = 600

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: ["Paris", "London"]
doc_to_target: gold
metric_list:
  - metric: acc
"""
STORY = """
task: story
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs:
  until: ["no model says this"]
  max_gen_toks: 48
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two quick tasks, and `story`, which keeps a tiny model busy for many seconds."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows = ({"question": f"What is the capital of country {n}?", "gold": n % 2} for n in range(DOCUMENTS))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("quick", "second"):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data))
    (folder / "story.yaml").write_text(STORY.format(data=data))
    return folder


class Box:
    """A server as its user sees it."""

    def __init__(self, server: Server, client: EvalClient, model: Path) -> None:
        self.server = server
        self.client = client
        self.model = str(model)

    def submit(self, *tasks: str, **fields: Any) -> str:
        return self.client.evaluate(self.model, list(tasks), **fields)["job_id"]

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.get_job(job_id)

    def until(self, job_id: str, holds: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """The job, as soon as that holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            job = self.job(job_id)
            if holds(job):
                return job
            time.sleep(POLL_SECONDS)  # between two looks, not in hope
        pytest.fail(f"did not happen: {self.job(job_id)}\n{self.server.log.read_text()}")

    def answering(self, job_id: str) -> dict[str, Any]:
        """The job, once workers have answered some of it but not all."""
        job = self.until(job_id, lambda job: job["progress"] and job["progress"]["done"] > 0)
        assert job["status"] == "running", job["error"]
        return job

    def ended(self, job_id: str) -> dict[str, Any]:
        return self.until(job_id, lambda job: job["status"] in ("completed", "failed", "cancelled"))

    def completed(self, job_id: str) -> dict[str, Any]:
        job = self.ended(job_id)
        assert job["status"] == "completed", job["error"]
        return job

    def workers(self) -> dict[str, int]:
        """Worker -> pid."""
        return {worker["worker_id"]: worker["pid"] for worker in self.client.workers()["workers"]}

    def evaluator_of(self, job_id: str) -> int:
        """The process that writes the job's log."""
        log = os.path.realpath(self.server.data_dir / "jobs" / job_id / "job.log")
        (found,) = [pid for pid in self.server.processes() if os.path.realpath(f"/proc/{pid}/fd/1") == log]
        return found


@pytest.fixture
def start(tasks: Path, tmp_path: Path) -> Generator[Callable[..., Box]]:
    """Start servers that know the tasks, on one data folder: `start(model, "--cpu-workers", 2)`."""
    with ExitStack() as stack:

        def box(model: Path, *options: object) -> Box:
            options = ("--include-path", tasks, "--evaluators", 2, *options)
            server = stack.enter_context(run_server(tmp_path / "data", *options))
            return Box(server, stack.enter_context(EvalClient(server.url)), model)

        yield box


def test_a_killed_server_loses_nothing(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    finished = box.completed(box.submit("quick", limit=4))
    running, queued = box.submit("story"), box.submit("quick", limit=5)
    box.answering(running)
    box.server.kill()  # asserts that nothing is left behind

    box = start(tiny_model, "--cpu-workers", 1)
    assert box.job(finished["job_id"])["metrics"] == finished["metrics"]
    assert len(list(box.client.samples(finished["job_id"]))) == 4
    again = box.completed(running)
    assert again["attempt"] == 2
    assert 0 < again["progress"]["cached"] < DOCUMENTS  # resumed, not done anew
    assert len(list(box.client.samples(running))) == DOCUMENTS
    box.completed(queued)


def test_sigterm_puts_running_jobs_back(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    running = box.submit("story", use_cache=False)
    box.answering(running)
    box.server.stop()  # asserts a clean exit within seconds
    box = start(tiny_model, "--cpu-workers", 1)
    assert box.job(running)["status"] in ("queued", "running")
    assert box.client.cancel_job(running)
    assert box.ended(running)["status"] == "cancelled"


def test_cancelling(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    box.completed(box.submit("quick", limit=4))
    before = box.workers()
    running = box.submit("story", use_cache=False)
    box.answering(running)
    evaluator = os.pidfd_open(box.evaluator_of(running))
    others = [box.submit("story", use_cache=False) for _ in range(2)]
    queued = others[-1]
    assert box.job(queued)["status"] == "queued"
    for job_id in (queued, running, others[0]):
        assert box.client.cancel_job(job_id) == {"message": f"Job {job_id} cancelled"}
        assert box.client.wait_for_job(job_id, poll_interval=POLL_SECONDS, verbose=False)["status"] == "cancelled"
        with pytest.raises(httpx.HTTPStatusError, match="already finished or cancelled"):
            box.client.cancel_job(job_id)
    signal_gone(evaluator)
    box.completed(box.submit("quick", limit=4, use_cache=False))
    assert box.workers() == before  # the replica stayed warm


def signal_gone(descriptor: int) -> None:
    """Assert that the process of this pidfd is gone."""
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, 0)
    os.close(descriptor)


def test_a_killed_worker_costs_a_chunk_and_a_killed_evaluator_an_attempt(
    start: Callable[..., Box], tiny_model: Path
) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    job_id = box.submit("story", use_cache=False)
    box.answering(job_id)
    ((worker, pid),) = box.workers().items()
    os.kill(pid, signal.SIGKILL)
    job = box.until(job_id, lambda job: len(job["progress"]["workers"]) == 2)
    assert job["attempt"] == 1
    assert worker not in box.workers()
    os.kill(box.evaluator_of(job_id), signal.SIGKILL)
    assert box.completed(job_id)["attempt"] == 2


def test_a_worker_that_hangs_is_killed_when_its_job_is_cancelled(
    start: Callable[..., Box], tiny_model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "evalpool.toml"
    config.write_text("drop_timeout_s = 0.5\n")
    box = start(tiny_model, "--cpu-workers", 1, "--config", config)
    job_id = box.submit("story", use_cache=False)
    box.answering(job_id)
    ((worker, pid),) = box.workers().items()
    os.kill(pid, signal.SIGSTOP)
    box.client.cancel_job(job_id)
    assert box.ended(job_id)["status"] == "cancelled"
    box.completed(box.submit("quick", limit=4, use_cache=False))
    assert worker not in box.workers()


def test_jobs_share_two_workers_and_one_job_uses_both(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 2)
    job = box.completed(box.submit("story", num_gpus=2, limit=300, use_cache=False))
    assert len(job["progress"]["workers"]) == 2
    assert sum(job["progress"]["workers"].values()) == 300
    together = [box.submit("story", limit=60, use_cache=False) for _ in range(2)]
    spans = [(job["started_at"], job["completed_at"]) for job in map(box.completed, together)]
    assert max(started for started, _ in spans) < min(completed for _, completed in spans)


def test_tasks_are_published_one_by_one(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    job_id = box.submit("quick", "story", use_cache=False)
    job = box.until(job_id, lambda job: "quick" in job["metrics"])
    assert job["status"] == "running"
    assert "story" not in job["metrics"]
    assert len(list(box.client.samples(job_id, "quick"))) == DOCUMENTS
    box.client.cancel_job(job_id)
    assert "quick" in box.ended(job_id)["metrics"]


def test_overwritten_weights_are_another_model(start: Callable[..., Box], tiny_model: Path, tmp_path: Path) -> None:
    latest, other = tmp_path / "latest", tmp_path / "other"
    shutil.copytree(tiny_model, latest)
    script = Path(__file__).with_name("make_tiny_model.py")
    subprocess.run([sys.executable, script, other, "1"], check=True, capture_output=True)
    box = start(latest, "--cpu-workers", 1)
    first = box.completed(box.submit("quick", limit=4))
    shutil.copyfile(other / "model.safetensors", latest / "model.safetensors")
    second = box.completed(box.submit("quick", limit=4))
    assert first["model"]["fingerprint"] != second["model"]["fingerprint"]
    answers = [[sample["filtered_resps"] for sample in box.client.samples(job["job_id"])] for job in (first, second)]
    assert answers[0] != answers[1]
    (latest / "model.safetensors").write_bytes(b"no weights at all")
    broken = box.ended(box.submit("quick", limit=4))
    assert broken["status"] == "failed"
    assert "latest" in broken["error"]
    box.model = str(other)
    box.completed(box.submit("quick", limit=4))


def test_a_data_folder_serves_one_server(start: Callable[..., Box], tiny_model: Path) -> None:
    box = start(tiny_model, "--cpu-workers", 1)
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--data-dir", str(box.server.data_dir)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert second.returncode == 1
    assert "another server uses the data folder" in second.stderr

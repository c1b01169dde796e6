"""What tests of the whole service share: two local tasks, and looks at a server until it shows what is awaited."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from evalpool_server import Server

from server.client import EvalClient

PATIENCE_SECONDS = 300.0  # a bound for a loaded machine, not an expectation
DOCUMENTS = 3000
NO_ARGS: Mapping[str, Any] = MappingProxyType({})
Json = dict[str, Any]
T = TypeVar("T")

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: ["yes", "no"]
doc_to_target: gold
metric_list:
  - metric: acc
"""
STORY = """
output_type: generate_until
doc_to_text: "Tell me: {{question}}"
doc_to_target: "x"
generation_kwargs:
  until: ["never to be said"]
  max_gen_toks: 160
  do_sample: false
metric_list:
  - metric: bypass
"""


def write_tasks(folder: Path) -> Path:
    """`quick_choice`: as many requests as twice the limit, each a moment. `long_story`: its limit sets the seconds."""
    return write_task_files(folder, {"quick_choice": CHOICE, "long_story": STORY}, DOCUMENTS)


def write_task_files(folder: Path, bodies: Mapping[str, str], documents: int) -> Path:
    """Tasks of these names and YAML bodies on questions of our own: fields `question`, and `gold`, which is 0 or 1."""
    folder.mkdir(exist_ok=True)
    data = folder / "questions.jsonl"
    rows = ({"question": f"is {number} a lucky number?", "gold": number % 2} for number in range(documents))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in bodies.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{body}{COMMON.format(data=data)}")
    return folder


GATED = """
from pathlib import Path

gate = Path(__file__).with_name("gate")

def ask(document):
    if " 7 " in document["question"]:
        try:
            gate.read_bytes()  # a named pipe: until somebody has opened it for writing, and closed it
        except FileNotFoundError:
            pass
    return f"Gated question: {document['question']}\\nAnswer:"  # no other task's, so nothing else answers it
"""


class Gate:
    """`gated_choice`, a task whose requests cannot be built beyond the seventh document while this is shut."""

    def __init__(self, tasks: Path) -> None:
        """It is shut, and the task in the folder."""
        template = '"Question: {{question}}\\nAnswer:"'
        assert template in CHOICE
        write_task_files(tasks, {"gated_choice": CHOICE.replace(template, "!function gated.ask")}, DOCUMENTS)
        (tasks / "gated.py").write_text(GATED)
        self._pipe = tasks / "gate"
        os.mkfifo(self._pipe)

    def open(self) -> None:
        """Whoever waits goes on, and nobody waits any more."""
        descriptor = os.open(self._pipe, os.O_RDWR)
        self._pipe.unlink()
        os.close(descriptor)


def until(look: Callable[[], T], what: str, explain: Callable[[], str] = str) -> T:
    """The first true thing that `look` returns; `explain` says what there is instead, when it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (seen := look()):
        assert time.monotonic() < deadline, f"waited in vain until {what}\n{explain()}"
        time.sleep(0.02)
    return seen


class Service:
    """A server, its client, and short words for what tests do with them; a context manager."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.client = EvalClient(server.url, timeout=PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.client.close()

    def submit(self, model: Path, *tasks: str, model_args: Mapping[str, Any] = NO_ARGS, **options: Any) -> str:
        """The new job's id; the response cache is off unless `use_cache` says otherwise."""
        options = {"use_cache": False, "device": "cpu"} | options
        return self.client.evaluate("hf", list(tasks), {"pretrained": str(model), **model_args}, **options)["job_id"]

    def job(self, job_id: str) -> Json:
        return self.client.get_job(job_id)

    def job_once(self, job_id: str, ready: Callable[[Json], Any], what: str) -> Json:
        """The job as it is when `ready`; fails at once when it has ended without."""

        def look() -> Json | None:
            job = self.job(job_id)
            if ready(job):
                return job
            assert job["completed_at"] is None, f"ended before {what}: {job['status']} {job['error']}\n{self.log()}"
            return None

        return until(look, what, lambda: self.state(job_id))

    def state(self, job_id: str) -> str:
        """What one wants to see when the job does not go on: itself, why jobs wait, workers and logs."""
        job_log = self.server.data_dir / "jobs" / job_id / "job.log"
        logs = [log.read_text() for log in (job_log, self.server.log) if log.exists()]
        shown = (self.job(job_id), self.client.get_queue_status(), self.client.workers(), self.client.gpus())
        return "\n".join([*(json.dumps(each, indent=1) for each in shown), *logs])

    def answering(self, job_id: str) -> Json:
        """The job as soon as workers have answered some of its requests, with most still to do."""
        return self.job_once(job_id, lambda job: job["progress"] and job["progress"]["workers"], "it has answers")

    def finished(self, job_id: str) -> Json:
        """The job once it is completed."""
        return self.job_once(job_id, lambda job: job["status"] == "completed", "it is completed")

    def ended(self, job_id: str) -> Json:
        """The job once it has ended, however."""
        return self.job_once(job_id, lambda job: job["completed_at"], "it has ended")

    def workers_of(self, job_id: str) -> list[Json]:
        return [worker for worker in self.client.workers()["workers"] if job_id in worker["jobs"]]

    def worker_pids(self) -> dict[str, int]:
        return {worker["worker_id"]: worker["pid"] for worker in self.client.workers()["workers"]}

    def evaluator_pid(self, job_id: str) -> int:
        """The process that runs the job."""
        return self._writer_of(f"jobs/{job_id}/job.log")

    def desk_pid(self) -> int:
        """The process that checks submissions."""
        return self._writer_of("logs/desk.log")

    def _writer_of(self, log: str) -> int:
        path = self.server.data_dir.resolve() / log
        [pid] = [pid for pid in self.server.processes() if _stderr_of(pid) == path]
        return pid

    def log(self) -> str:
        return self.server.log.read_text()


def _stderr_of(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/fd/2").readlink()
    except OSError:
        return None


def await_end(pid: int) -> None:
    """Return when the process is gone."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ready, _, _ = select.select([descriptor], [], [], PATIENCE_SECONDS)
    os.close(descriptor)
    assert ready, f"process {pid} still lives"

"""The evaluator's loop: one question or job at a time from the control pipe, workers' comings and goings meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_pool.child import redirect_output
from gpu_pool.evaluator.failures import ContentChanged, explain
from gpu_pool.messages import (
    MAX_MESSAGE_BYTES,
    Alive,
    AttachWorker,
    BuildCatalogue,
    Catalogue,
    CheckTasks,
    DetachWorker,
    EvaluatorFailed,
    EvaluatorReady,
    EvaluatorStart,
    JobFailed,
    Message,
    Ping,
    RunJob,
    Shutdown,
    TasksChecked,
    WorkerDetached,
    decode_to_evaluator,
    encode,
)

if TYPE_CHECKING:
    from gpu_pool.evaluator.catalogue import TaskLibrary
    from gpu_pool.evaluator.job import JobRun

OpenJob = Callable[[RunJob, Callable[[Message], None]], "JobRun"]
"""Makes the run of a job, given where its messages go."""

_log = logging.getLogger(__name__)


class EvaluatorLoop:
    """Serves one control pipe until it closes. `watch` it from the beginning, `serve` when all is imported."""

    def __init__(self, connection: Connection[Any, Any], start: EvaluatorStart) -> None:
        self._connection = connection
        self._start = start
        self._open_job: OpenJob | None = None
        self._inbox: queue.SimpleQueue[CheckTasks | BuildCatalogue | tuple[RunJob, JobRun]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._job: JobRun | None = None

    def watch(self) -> None:
        """Take messages from now on, whatever the main thread does; their end is that of the process."""
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def serve(self, library: TaskLibrary, open_job: OpenJob | None) -> None:
        """Answer for ever; `open_job` is None in an evaluator that only answers questions."""
        self._open_job = open_job
        self._say_ready()
        while True:
            match self._inbox.get():
                case CheckTasks() as asked:
                    problems = library.check(
                        asked.tasks, asked.num_fewshot, frozenset(asked.modalities), no_scores=asked.no_scores
                    )
                    self._send(TasksChecked(check_id=asked.check_id, problems=problems))
                case BuildCatalogue():
                    self._send(Catalogue(entries=library.entries()))
                case (message, job):
                    self._run(message, job)
                    self._say_ready()

    def _read(self) -> None:
        """Take messages off the pipe; whatever ends this ends the process at once, jobs and all."""
        try:
            while (frame := self._next_frame()) and self._receive(decode_to_evaluator(frame)):
                pass
        except BaseException as error:
            _log.exception("The evaluator ends: what the server said cannot be done")
            with contextlib.suppress(OSError):
                self._send(EvaluatorFailed(error=explain(error)))
            os._exit(1)
        os._exit(0)

    def _next_frame(self) -> bytes | None:
        """A message; None when there is no server any more."""
        try:
            return self._connection.recv_bytes(MAX_MESSAGE_BYTES)
        except (EOFError, OSError):
            return None

    def _receive(self, message: Any) -> bool:
        """Take in one message; False when it was the last."""
        match message:
            case Shutdown():
                return False
            case Ping():
                self._send(Alive())
            case AttachWorker(job_id=job_id, worker_id=worker_id, address=address):
                if self._job and self._job.dispatcher.job_id == job_id:
                    self._job.dispatcher.attach(worker_id, address)
            case DetachWorker(job_id=job_id, worker_id=worker_id, cause=cause):
                if self._job and self._job.dispatcher.job_id == job_id:
                    then = partial(self._send, WorkerDetached(job_id=job_id, worker_id=worker_id))
                    how = {"at_once": message.at_once, "from_outside": message.from_outside}
                    self._job.dispatcher.detach(worker_id, cause=cause, then=then, **how)
            case RunJob():
                assert self._open_job is not None, "this evaluator was started without what jobs need"
                self._job = self._open_job(message, self._send)
                self._inbox.put((message, self._job))
            case _:
                self._inbox.put(message)
        return True

    def _run(self, message: RunJob, job: JobRun) -> None:
        try:
            redirect_output(message.log_path)
            self._send(job.execute())
        except Exception as error:
            _log.exception("The job failed")
            changed = isinstance(error, ContentChanged)
            self._send(JobFailed(job_id=message.job_id, error=explain(error), content_changed=changed))
        finally:
            self._job = None
            redirect_output(self._start.log_path)

    def _send(self, message: Message) -> None:
        with self._sending:
            self._connection.send_bytes(encode(message))

    def _say_ready(self) -> None:
        gc.collect()
        _give_memory_back()
        self._send(EvaluatorReady(rss_bytes=_rss_bytes()))


def _give_memory_back() -> None:
    """Let the C library return what is free; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

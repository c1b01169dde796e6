"""A server under fire: started with a step of its journal armed, and started again whenever it was killed."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from chaos_tasks import DOCUMENTS, TASKS, write_chaos_tasks
from evalpool_server import run_server
from kill_points import FOLDER_VARIABLE, RANKS_VARIABLE, Control, Plan, Point
from outcomes import Outcome, assert_sound, attempts, outcome
from service import PATIENCE_SECONDS, Service, until

from gpu_pool.fingerprint import memo_path
from server.client import EvalError

Json = dict[str, Any]
T = TypeVar("T")
PROGRAM = (Path(__file__).with_name("chaos_server.py"),)
LOOK_SECONDS = 0.02
OPTIONS: Json = {"use_cache": True, "deterministic": True, "limit": 6, "bootstrap_iters": 2000}
"""Of the jobs: that answers are bits, so that any difference is seen."""


class NotPassed(AssertionError):
    """The job went another way. How its requests are cut into chunks is a matter of their pace."""


class Box:
    """One data folder and the servers on it, one after the other; a context manager."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        data_dir: Path | None = None,
        evaluators: int | None = 1,
        workers: int = 1,
        ranks: int = 1,
        settings: str = "",
    ) -> None:
        """`data_dir` is in `folder` unless given; `evaluators` None: the default; `settings` are lines of the file."""
        self.data_dir = data_dir or folder / "data"
        self.control = Control(folder / "control")
        self.model = model
        self._workers = workers
        self._ranks = ranks
        config = folder / "evalpool.toml"
        config.write_text(("" if evaluators is None else f"evaluators = {evaluators}\n") + settings)
        self._arguments = ("--config", config, "--include-path", write_chaos_tasks(folder / "tasks"))
        self._arguments += ("--cpu-workers", workers)
        self._variables = {FOLDER_VARIABLE: str(self.control.folder), RANKS_VARIABLE: str(ranks)}
        self._running = contextlib.ExitStack()
        self._service: Service | None = None
        self.starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._running.close()

    @property
    def service(self) -> Service:
        """The one that runs now: started when there is none, and again after its end.

        Raises RuntimeError when it ends while it starts.
        """
        if self._service is not None and self._service.server.process.poll() is not None:
            self._service.server.bury()
            self._running.close()
            self._service = None
            assert_sound(self.data_dir)
        if self._service is None:
            server = run_server(self.data_dir, *self._arguments, program=PROGRAM, variables=self._variables)
            self._service = self._running.enter_context(Service(self._running.enter_context(server)))
            self.starts += 1
        return self._service

    # ---------------------------------------------------------------- one job

    def run(self, plan: Plan | None = None, **options: Any) -> Outcome:
        """Have a job evaluated that no cache knows, carrying out the plan; asserts that it completes, and once.

        Raises NotPassed.
        """
        self.settle()
        self.forget()
        completed = self.service.client.get_queue_status()["completed_jobs"]
        self.control.arm(plan)
        job = self.completed(self.submit(**options))
        if plan is not None and not self.control.has_fired():
            raise NotPassed(plan.point)
        assert self.service.client.get_queue_status()["completed_jobs"] == completed + 1
        numbers, ends = zip(*attempts(self.data_dir, job["job_id"]), strict=True)
        assert numbers == tuple(range(1, len(numbers) + 1))
        assert ends == ("requeued",) * (len(ends) - 1) + ("completed",)
        assert len(numbers) == 1 or (plan is not None and plan.victim in ("server", "evaluator"))
        return outcome(job)

    def cancel(self, plan: Plan | None = None) -> list[Point]:
        """Have a job cancelled that computes, carrying out the plan from then on; asserts that it is cancelled, once.

        Returns what was passed meanwhile.

        Raises NotPassed.
        """
        self.settle()
        self.forget()
        cancelled = self.service.client.get_queue_status()["cancelled_jobs"]
        self.control.arm(None)
        job_id = self.submit(limit=DOCUMENTS)
        until(lambda: any(point.step == "after answers" for point in self.control.passages()), "it computes")
        self.control.arm(plan)
        self.asked(lambda service: try_to_cancel(service, job_id))
        job = self.ended(job_id)
        if plan is not None and not self.control.has_fired():
            raise NotPassed(plan.point)
        assert job["status"] == "cancelled"
        assert self.service.client.get_queue_status()["cancelled_jobs"] == cancelled + 1
        numbers, ends = zip(*attempts(self.data_dir, job_id), strict=True)
        assert numbers == tuple(range(1, len(numbers) + 1))
        assert set(ends[:-1]) <= {"requeued"}
        assert ends[-1] in ("cancelled", "requeued"), "it was cancelled while it ran, or waited to run again"
        return self.control.passages()

    def settle(self) -> None:
        """Until processes of each kind wait for work, the workers with the model."""
        until(lambda: self.service and all(map(self.control.alive, ("server", "desk", "evaluator"))), "they live")
        self.control.arm(None)
        while not self._are_loaded():
            self.completed(self.submit(num_gpus=self._workers))
            until(lambda: "starting" not in self._states(), "the workers have loaded")

    def _are_loaded(self) -> bool:
        """Whether all workers hold the model; those that were killed just now are waited for until they are gone."""
        workers = self.service.client.workers()["workers"]
        idle = {worker["pid"] for worker in workers if worker["state"] == "idle"}
        until(lambda: self._is_whole(idle) or self._states().count("idle") < len(idle), "a killed worker has ended")
        return self._states().count("idle") >= self._workers

    def _is_whole(self, workers: set[int]) -> bool:
        """Whether these live, and so do their other ranks."""
        others = (self._ranks - 1) * len(workers)
        return workers <= {*self.control.alive("worker")} and len(self.control.alive("rank")) >= others

    def forget(self) -> None:
        """Empty the response cache and the memo of fingerprints."""
        memo_path(self.data_dir).unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(self.data_dir / "cache" / "responses.sqlite", timeout=30)) as cache:
            tables = cache.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
            for (table,) in tables.fetchall():
                cache.execute(f"DELETE FROM {table}")
            cache.commit()

    def submit(self, *, tasks: Sequence[str] = TASKS, **options: Any) -> str:
        """Its id. Submitted again as long as no server knows of it."""
        known = self.asked(_newest)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return self.asked(lambda service: service.submit(self.model, *tasks, **(OPTIONS | options)), 0.0)
            except (httpx.HTTPError, RuntimeError):
                if time.monotonic() > deadline:
                    raise
                if (newest := self.asked(_newest)) and newest != known:
                    return newest

    def ended(self, job_id: str) -> Json:
        """The job once it has ended, over any number of servers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (job := self.asked(lambda service: service.job(job_id)))["completed_at"]:
            assert time.monotonic() < deadline, f"job {job_id} does not end\n{self.service.log()}"
            time.sleep(LOOK_SECONDS)
        return job

    def completed(self, job_id: str) -> Json:
        """The job once it is completed, over any number of servers."""
        job = self.ended(job_id)
        assert job["status"] == "completed", f"{job['status']}: {job['error']}\n{self.service.log()}"
        return job

    def _states(self) -> list[str]:
        return [worker["state"] for worker in self.service.client.workers()["workers"]]

    def asked(self, ask: Callable[[Service], T], patience_seconds: float = PATIENCE_SECONDS) -> T:
        """What a server answers, the next one where one ends before it does."""
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                return ask(self.service)
            except (httpx.TransportError, RuntimeError):  # it ends now, or while it starts
                if time.monotonic() >= deadline:
                    raise
                time.sleep(LOOK_SECONDS)


def try_to_cancel(service: Service, job_id: str) -> bool:
    """False: it has ended before."""
    try:
        service.client.cancel_job(job_id)
    except EvalError as error:
        if error.response.status_code != HTTPStatus.BAD_REQUEST:
            raise
        return False
    return True


def _newest(service: Service) -> str | None:
    return next((job["job_id"] for job in service.client.jobs(limit=1)["jobs"]), None)

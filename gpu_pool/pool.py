"""The pool as the server sees it: submit, cancel, look. Wires store, leases, desk and runner together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from gpu_pool import events as ev
from gpu_pool import messages as msg
from gpu_pool.admission import Admission
from gpu_pool.api_models import check_endpoints
from gpu_pool.cache import cache_path
from gpu_pool.cache_upkeep import CacheUse, Pruned, cache_use, prune
from gpu_pool.database_admin import database_of
from gpu_pool.desk import Desk
from gpu_pool.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    JobAlreadyFinished,
    PoolError,
    ShuttingDown,
)
from gpu_pool.file_lock import lock_folder
from gpu_pool.fleet import EvaluatorChild, Processes
from gpu_pool.gpus import Inventory
from gpu_pool.history import HistoryEntry
from gpu_pool.intake import Intake
from gpu_pool.leases import Leases
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.local_processes import LocalProcesses
from gpu_pool.merge import plan_merge
from gpu_pool.merges import Merges
from gpu_pool.process_logs import keep_bounded
from gpu_pool.reasons import Reasons
from gpu_pool.records import CheckpointType, Evaluation, Job, JobState, Merge
from gpu_pool.retention import Retention
from gpu_pool.runner import Runner
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.views import GpuView, QueueView, WaitingView, WorkerView

LOOK_SECONDS = 5.0
"""How often the hardware and the database's file are looked at while nothing else asks."""
TICK_SECONDS = 1.0
"""How often time is looked at: timeouts, idle workers, growth."""

logger = logging.getLogger(__name__)


class Pool:
    """Jobs and the processes that run them. `start` it, use it, `stop` it."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = msgspec.structs.replace(settings, data_dir=settings.data_dir.absolute())
        inventory = Inventory.open(allow=self.settings.allow_gpus, deny=self.settings.deny_gpus)
        for problem in inventory.unknown if inventory.answers else ():
            logger.warning("%s", problem)
        self._leases = Leases(self.settings, inventory)
        self.failure: BaseException | None = None
        """What made the pool ask for the server's end, if it did."""
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Open the data folder and take up unfinished jobs; processes start in the background.

        Raises DataDirInUse, and PoolError for a setting that cannot be honoured.
        """
        if missing := [str(path) for path in self.settings.include_paths if not path.is_dir()]:
            raise PoolError(f"include_paths: there is no such folder: {', '.join(missing)}")
        check_endpoints(self.settings.endpoints)
        data_dir = self.settings.data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(data_dir)
        self._processes = LocalProcesses(self.settings, self._leases.visible_device)
        self._store = await Store.open(database_of(self.settings), alone=True)
        await self._processes.start()
        self._desk = Desk(self._processes.desk, self.settings.unresponsive_s)
        admission = Admission(self.settings, self._desk, self._leases)
        processes = Processes(
            evaluator=self._start_evaluator, worker=self._processes.worker, address=self._processes.address
        )
        self._jobs = LiveJobs(self._store, await self._store.counts())
        self._runner = Runner(
            self.settings,
            self._jobs,
            self._leases,
            processes,
            self.job_dir,
            lambda job, ran_s: self._intake.take_up(job, ran_s),
        )
        self._merges = Merges(self.settings, self._store, self._jobs, self._processes.merger, self.job_dir)
        self._intake = Intake(self.settings, self._store, self._jobs, admission, self._runner, self._merges)
        self._reasons = Reasons(self._runner, self._jobs, self._merges, self._intake)
        await self._intake.recover()
        await self._look_once()
        if self._leases.gpus_unknown:
            logger.warning("%s Jobs wait for the driver unless they are for the CPU.", self._leases.problem())
        self._watch(self._desk.start())
        self._watch(self._runner.start())
        self._watch(asyncio.create_task(self._merges.run(), name="merges"))
        self._watch(asyncio.create_task(self._tick(), name="tick"))
        self._watch(asyncio.create_task(self._look(), name="look"))
        retention = Retention(self.settings, self._store, self._jobs.forget, data_dir / "jobs")
        self._watch(asyncio.create_task(retention.run(), name="retention"))
        fleet = self._runner.fleet
        logs = keep_bounded(data_dir / "logs", lambda: {"desk", *fleet.evaluators, *fleet.workers})
        self._watch(asyncio.create_task(logs, name="logs"))

    async def stop(self) -> None:
        """End every process within seconds; running jobs go back to the queue."""
        self._stopping = True
        self._store.give_up()
        await self._merges.stop()
        await asyncio.gather(self._runner.stop(), self._desk.stop())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()
        self._processes.close()
        os.close(self._lock)

    def _watch(self, task: asyncio.Task[None]) -> None:
        """A background task that dies stops the service, loudly."""
        self._tasks.append(task)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self._stopping:
            logger.critical("%s failed: the server stops", task.get_name(), exc_info=error)
            self.failure = error
            os.kill(os.getpid(), signal.SIGTERM)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._runner.put(ev.Tick)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self._store.look()
            await self._look_once()

    async def _look_once(self) -> None:
        await self._runner.look()
        for sentence, worker_ids in self._leases.news():
            logger.warning("%s (beside %s)", sentence, ", ".join(worker_ids))
            workers = self._runner.scheduler.ledger.workers
            for job_id in {job for worker_id in worker_ids if worker_id in workers for job in workers[worker_id].jobs}:
                _append_to_log(self.job_dir(job_id) / "job.log", sentence)

    async def _start_evaluator(self, evaluator_id: str) -> EvaluatorChild:
        """Not before the desk has left its task index on disk: building it is most of an evaluator's start."""
        await self._desk.wait_ready()
        return await self._processes.evaluator(evaluator_id)

    # ------------------------------------------------------------------ jobs

    async def submit(self, evaluation: Evaluation, request: dict[str, Any]) -> Job:
        """Check a request and make it a durable job, or find the one that has its idempotency key.

        Raises InvalidRequest (KeyReused when the key's request was another), ShuttingDown, DeskUnavailable and
        DatabaseUnavailable.
        """
        if self._stopping:
            raise ShuttingDown
        return await self._intake.submit(evaluation, request)

    async def merge(
        self,
        checkpoint: Path,
        output: Path | None,
        kind: CheckpointType,
        request: dict[str, Any],
        **options: int | tuple[str, ...],
    ) -> Job:
        """Check a merge and make it a durable job, or find the one that does the same; `plan_merge` says what it means.

        Raises CheckpointNotFound, NotMergeable, InvalidRequest, ShuttingDown and DatabaseUnavailable.
        """
        if self._stopping:
            raise ShuttingDown
        roots = (self.settings.data_dir, *self.settings.output_roots)
        merge = await asyncio.to_thread(plan_merge, checkpoint, output, kind, roots, **options)
        self._expect_database()
        return await self._merges.submit(merge, request)

    async def merged(self, job_id: str) -> Job:
        """A merge once it has ended, however. Raises JobNotFound, ShuttingDown."""
        return await self._merges.ended(job_id)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job, queued or running; it is durable on return.

        Raises JobNotFound, JobAlreadyFinished, ShuttingDown, DatabaseUnavailable.
        """
        if self._stopping:
            raise ShuttingDown
        if job_id not in self._jobs:
            await self._store.get(job_id)
            raise JobAlreadyFinished
        self._expect_database()
        if isinstance(self._jobs[job_id].work, Merge):
            await self._merges.cancel(job_id)
        else:
            await self._runner.cancel(job_id)
        job = await self.job(job_id)
        if job.state not in (JobState.CANCELLING, JobState.CANCELLED):
            raise JobAlreadyFinished
        return job

    def _expect_database(self) -> None:
        """Raise DatabaseUnavailable where the loops wait for it, and this would with them."""
        if reason := self._store.trouble:
            raise DatabaseUnavailable(reason)

    async def job(self, job_id: str) -> Job:
        """The job, with live progress. Raises JobNotFound."""
        return self._jobs.get(job_id) or await self._store.get(job_id)

    async def jobs(
        self, state: Collection[JobState] | None, limit: int, before: str | None, tags: Sequence[str] = ()
    ) -> list[Job]:
        """At most `limit` jobs with all `tags`, newest first, older than the job `before`.

        Raises InvalidRequest on `cursor`.
        """
        return await self._store.list(state, limit, before, live=self._jobs, tags=tags)

    async def history(self, job_id: str) -> Sequence[HistoryEntry]:
        """What happened to the job so far, in order. Raises JobNotFound."""
        await self.job(job_id)
        return await self._store.history(job_id)

    @property
    def trouble(self) -> str | None:
        """What keeps the pool from its work and will pass, in words."""
        if reason := self._store.trouble:
            return f"the job database cannot be used: {reason}"
        if reason := self._jobs.trouble:
            return reason
        return None if self.settings.max_gpus == 0 else self._leases.driver_trouble

    def queue_position(self, job_id: str) -> int | None:
        """How many queued jobs are ahead; None when the job is not queued."""
        return self._jobs.queued.position(job_id)

    def queue(self) -> QueueView:
        """Who waits, who runs, and how many have ended."""
        ended = self._jobs.ended
        return QueueView(
            queued=tuple(self._jobs.queued),
            running=tuple(self._jobs.active),
            completed=ended.get(JobState.COMPLETED, 0),
            failed=ended.get(JobState.FAILED, 0),
            cancelled=ended.get(JobState.CANCELLED, 0),
        )

    def queue_size(self) -> int:
        """How many jobs wait."""
        return len(self._jobs.queued)

    def waiting(self, limit: int) -> list[WaitingView]:
        """Why jobs wait: running ones that cannot go on or lost their workers, and the first `limit` of the queue."""
        return self._reasons.first(limit)

    def why_waits(self, job_id: str) -> WaitingView | None:
        """Why a job waits; None when it does not."""
        return self._reasons.of(job_id)

    def eta_seconds(self, job_id: str) -> float | None:
        """Seconds that a running job still needs, from its rate so far; None while there is none, or no worker."""
        return self._jobs.eta_seconds(job_id, self._runner.ran_seconds(job_id))

    def job_dir(self, job_id: str) -> Path:
        """Folder of the job's log and, unless it names another, its results."""
        return self.settings.data_dir / "jobs" / job_id

    # ------------------------------------------------------------------ the box

    def workers(self) -> list[WorkerView]:
        """Worker processes, oldest first."""
        views: list[WorkerView] = []
        fleet = self._runner.fleet
        for worker in self._runner.scheduler.ledger.workers.values():
            child, loaded = fleet.workers.get(worker.id), fleet.loaded.get(worker.id)
            views.append(
                WorkerView(
                    worker=worker,
                    pid=child.pid if child else None,
                    description=loaded.description if loaded else None,
                    memory_bytes=loaded.memory_bytes if loaded else None,
                )
            )
        return views

    async def gpus(self) -> list[GpuView]:
        """Every GPU, as NVML shows it now, and who of us holds it."""
        return await self._leases.views()

    async def release_gpu(self, uuid: str) -> GpuView:
        """End a GPU's quarantine. Raises GpuNotFound, GpuNotQuarantined."""
        view = await self._leases.release_gpu(uuid)
        await self._look_once()
        return view

    def gpu_problem(self) -> str | None:
        """Why no GPU can be used, or what is wrong with the lists of GPUs; None: nothing."""
        return self._leases.problem()

    async def catalogue(self) -> tuple[msg.TaskEntry, ...]:
        """Every task, group and tag; waits for the first index."""
        return await self._desk.catalogue()

    async def cache_use(self) -> CacheUse:
        """What the response cache holds. Raises CacheUnusable."""
        path = cache_path(self.settings.data_dir)
        return await asyncio.to_thread(cache_use, path, self.settings.cache_max_bytes)

    async def prune_cache(self, older_than_days: int | None, model: str | None) -> Pruned:
        """Delete answers not used for so long, or of a model (fingerprint, the beginning of one, or name); with neither
        what is above the size limit. Raises CacheUnusable, InvalidRequest on `model`."""
        known = (await self.cache_use()).models
        wanted = None if model is None else [one.fingerprint for one in known if one.is_called(model)]
        if wanted == []:
            raise InvalidRequest("model", "the cache has no such model", choices=[one.name for one in known])
        path = cache_path(self.settings.data_dir)
        return await asyncio.to_thread(prune, path, self.settings.cache_max_bytes, older_than_days, wanted)


def _append_to_log(path: Path, sentence: str) -> None:
    """A line in a job's log, in the format of its evaluator, which appends to the file too."""
    with contextlib.suppress(OSError), path.open("a") as log:
        log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S},000 WARNING gpu_pool.pool: {sentence}\n")

"""The pool as the server sees it: submit, cancel, look. Wires store, leases, desk and runner together."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from gpu_pool import events as ev
from gpu_pool import messages as msg
from gpu_pool.admission import Admission
from gpu_pool.desk import Desk
from gpu_pool.errors import DataDirInUse, InvalidRequest, JobAlreadyFinished, PoolError, ShuttingDown
from gpu_pool.evaluator.entry import evaluator_main
from gpu_pool.fingerprint import fingerprint_model
from gpu_pool.gpus import Inventory
from gpu_pool.leases import Leases
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.records import Evaluation, GpuView, Job, JobState, ModelSpec, QueueView, Slot, WorkerView
from gpu_pool.runner import EvaluatorChild, Processes, Runner, WorkerChild
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store
from gpu_pool.supervisor import spawn
from gpu_pool.transitions import JobEvent, advance_job
from gpu_pool.worker.entry import worker_main

LOOK_SECONDS = 5.0
"""How often the hardware is looked at while nothing else asks."""
TICK_SECONDS = 1.0
"""How often jobs are looked at for growth."""
MAX_SOCKET_PATH = 100
"""Longest path of a unix socket that every system accepts, a little rounded."""

logger = logging.getLogger(__name__)


class Pool:
    """Jobs and the processes that run them. `start` it, use it, `stop` it."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = msgspec.structs.replace(settings, data_dir=settings.data_dir.absolute())
        self._leases = Leases(self.settings, Inventory.open())
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
        data_dir = self.settings.data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_folder(data_dir)
        self._sockets = _socket_folder(data_dir)
        self._store = await Store.open(data_dir / "jobs.sqlite")
        self._desk = Desk(self._spawn_desk)
        self._admission = Admission(self.settings, self._desk, self._leases)
        processes = Processes(evaluator=self._spawn_indexed_evaluator, worker=self._spawn_worker, address=self._address)
        self._jobs = LiveJobs(self._store, await self._store.counts())
        self._runner = Runner(self.settings, self._jobs, self._leases, processes, self.job_dir, self._take_up)
        await self._recover()
        seen = await self._leases.look(())
        self._runner.put(ev.SlotsSeen, slots=seen)
        self._watch(self._desk.start())
        self._watch(self._runner.start())
        self._watch(asyncio.create_task(self._tick(), name="tick"))
        self._watch(asyncio.create_task(self._look(), name="look"))

    async def stop(self) -> None:
        """End every process within seconds; running jobs go back to the queue."""
        self._stopping = True
        await asyncio.gather(self._runner.stop(), self._desk.stop())
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()
        shutil.rmtree(self._sockets, ignore_errors=True)
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
            if self._jobs:
                self._runner.put(ev.Tick)

    async def _look(self) -> None:
        while self._leases.has_gpus:
            await asyncio.sleep(LOOK_SECONDS)
            self._runner.put(ev.SlotsSeen, slots=await self._leases.look(self._runner.own_pids()))

    async def _recover(self) -> None:
        """Unfinished jobs of the last run: those being cancelled are cancelled, the others wait again."""
        for job in await self._store.unfinished():
            if job.state is JobState.CANCELLING:
                state = advance_job(job.state, JobEvent.RELEASED)
                await self._store.change_state(job.id, job.state, state, completed_at=datetime.now(UTC))
                continue
            if job.state is JobState.RUNNING:
                await self._store.end_attempt(job.id, job.attempt, datetime.now(UTC), "requeued", "the server ended")
                state = advance_job(job.state, JobEvent.REQUEUE)
                await self._store.change_state(job.id, job.state, state)
                job = msgspec.structs.replace(job, state=state, progress=None)
            self._jobs[job.id] = job
            self._take_up(job)

    # ------------------------------------------------------------------ jobs

    async def submit(self, evaluation: Evaluation, request: dict[str, Any]) -> Job:
        """Check a request and make it a durable job. Raises InvalidRequest, ShuttingDown, DeskUnavailable."""
        if self._stopping:
            raise ShuttingDown
        args = await self._admission.admit(evaluation)
        job = Job(id=str(uuid.uuid4()), evaluation=evaluation, request=request, created_at=datetime.now(UTC))
        await self._store.add(job)
        self._jobs[job.id] = job
        logger.info("job %s is queued: %s on %s", job.id, ", ".join(evaluation.tasks), args.pretrained)
        self._take_up(job)
        return job

    def _take_up(self, job: Job) -> None:
        """Find the content of a queued job's model in the background, then let the scheduler have the job."""
        self._runner.background(self._identify(job))

    async def _identify(self, job: Job) -> None:
        try:
            place = self._admission.place(job.evaluation)
            args = await self._admission.model_args(job.evaluation)
            digest = await asyncio.to_thread(fingerprint_model, args, self.settings.data_dir / "fingerprints.json")
        except (InvalidRequest, OSError) as error:
            await self._runner.settle_queued(job.id, JobEvent.FAIL, str(error))
            return
        spec = ModelSpec(kind="hf", args=args, fingerprint=digest, device=place.device)
        demand = ev.Demand(
            job_id=job.id,
            spec=spec,
            max_replicas=place.max_replicas,
            order=job.created_at.timestamp(),
            slot_index=place.slot_index,
        )
        await self._runner.submit(demand)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job, queued or running; it is durable on return. Raises JobNotFound, JobAlreadyFinished."""
        if self._stopping:
            raise ShuttingDown
        if job_id not in self._jobs:
            await self._store.get(job_id)
            raise JobAlreadyFinished
        await self._runner.settle_queued(job_id, JobEvent.CANCEL, None)  # while its model is still being looked at
        await self._runner.handle(ev.CancelRequested, job_id=job_id)
        job = await self.job(job_id)
        if job.state not in (JobState.CANCELLING, JobState.CANCELLED):
            raise JobAlreadyFinished
        return job

    async def job(self, job_id: str) -> Job:
        """The job, with live progress. Raises JobNotFound."""
        return self._jobs.get(job_id) or await self._store.get(job_id)

    async def jobs(self, state: Collection[JobState] | None, limit: int, before: str | None) -> list[Job]:
        """At most `limit` jobs, newest first, older than the job `before`. Raises InvalidRequest on `cursor`."""
        found = await self._store.list(state, limit, before)
        return [self._jobs.get(job.id, job) for job in found]

    def queue_position(self, job_id: str) -> int | None:
        """How many queued jobs are ahead; None when the job is not queued."""
        queued = self.queue().queued
        return queued.index(job_id) if job_id in queued else None

    def queue(self) -> QueueView:
        """Who waits, who runs, and how many have ended."""
        jobs = sorted(self._jobs.values(), key=lambda job: job.created_at)
        ended = self._jobs.ended
        return QueueView(
            queued=tuple(job.id for job in jobs if job.state is JobState.QUEUED),
            running=tuple(job.id for job in jobs if job.state in (JobState.RUNNING, JobState.CANCELLING)),
            completed=ended.get(JobState.COMPLETED, 0),
            failed=ended.get(JobState.FAILED, 0),
            cancelled=ended.get(JobState.CANCELLED, 0),
        )

    def eta_seconds(self, job_id: str) -> float | None:
        """Seconds that a running job still needs, from its rate so far; None while there is no rate."""
        return self._jobs.eta_seconds(job_id)

    def job_dir(self, job_id: str) -> Path:
        """Folder of the job's log and, unless it names another, its results."""
        return self.settings.data_dir / "jobs" / job_id

    # ------------------------------------------------------------------ the box

    def workers(self) -> list[WorkerView]:
        """Worker processes, oldest first."""
        views: list[WorkerView] = []
        for worker in self._runner.scheduler.workers.values():
            child, loaded = self._runner.workers.get(worker.id), self._runner.loaded.get(worker.id)
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
        return await self._leases.views(self._runner.scheduler.leased(), self._runner.own_pids())

    async def catalogue(self) -> tuple[msg.TaskEntry, ...]:
        """Every task, group and tag; waits for the first index."""
        return await self._desk.catalogue()

    # ------------------------------------------------------------------ processes

    async def _spawn_desk(self, name: str) -> EvaluatorChild:
        return await self._spawn_evaluator(name, runs_jobs=False)

    async def _spawn_evaluator(self, evaluator_id: str, *, runs_jobs: bool = True) -> EvaluatorChild:
        settings = self.settings
        start = msg.EvaluatorStart(
            evaluator_id=evaluator_id,
            data_dir=str(settings.data_dir),
            log_path=str(settings.data_dir / "logs" / f"{evaluator_id}.log"),
            include_paths=tuple(str(path) for path in settings.include_paths),
            dataset_roots=settings.dataset_roots,
            allow_code_execution=settings.allow_code_execution,
            allow_remote_code=settings.allow_remote_code,
            runs_jobs=runs_jobs,
        )
        return await spawn(evaluator_id, evaluator_main, start, msg.decode_from_evaluator)

    async def _spawn_indexed_evaluator(self, evaluator_id: str) -> EvaluatorChild:
        """Not before the desk has left its task index on disk: building it is most of an evaluator's start."""
        await self._desk.wait_ready()
        return await self._spawn_evaluator(evaluator_id)

    async def _spawn_worker(self, worker_id: str, spec: ModelSpec, slots: list[Slot]) -> WorkerChild:
        settings = self.settings
        start = msg.WorkerStart(
            worker_id=worker_id,
            spec=spec,
            socket_path=self._address(worker_id),
            log_path=str(settings.data_dir / "logs" / f"{worker_id}.log"),
            data_dir=str(settings.data_dir),
            visible_devices=",".join(self._leases.visible_device(slot.id) for slot in slots if slot.device == "cuda"),
            threads=max(1, (os.cpu_count() or 1) // max(1, settings.cpu_workers)),
            allow_remote_code=settings.allow_remote_code,
        )
        return await spawn(worker_id, worker_main, start, msg.decode_from_worker)

    def _address(self, worker_id: str) -> str:
        return str(self._sockets / f"{worker_id}.sock")


def _lock_folder(folder: Path) -> int:
    """Hold the folder for this process; raises DataDirInUse. The lock goes with the process."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataDirInUse(f"another server uses the data folder {folder}") from None
    return descriptor


def _socket_folder(data_dir: Path) -> Path:
    """An empty private folder for sockets, in the data folder unless its path is too long for one."""
    folder = data_dir / "run"
    if len(os.fsencode(folder)) + len("/worker-1000000.sock") > MAX_SOCKET_PATH:
        return Path(tempfile.mkdtemp(prefix="evalpool-"))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder

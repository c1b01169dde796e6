"""Carries out what the scheduler asks for, by processes and durable states. One loop takes events in order."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, assert_never

from gpu_pool import events as ev
from gpu_pool import messages as msg
from gpu_pool.errors import DISK_FULL, DatabaseUnavailable, ShuttingDown
from gpu_pool.fingerprint import changed_models, memo_path
from gpu_pool.fleet import Fleet, JobMessage, Processes
from gpu_pool.leases import Leases
from gpu_pool.live_jobs import LiveJobs
from gpu_pool.machine_memory import machine_bytes
from gpu_pool.records import Job, JobState
from gpu_pool.scheduler import Scheduler
from gpu_pool.settings import PoolSettings, evaluators_that_fit
from gpu_pool.transitions import JobEvent

logger = logging.getLogger(__name__)


class Runner:
    """The live side of the pool: unfinished jobs, their processes, and the loop between scheduler and world."""

    def __init__(
        self,
        settings: PoolSettings,
        jobs: LiveJobs,
        leases: Leases,
        processes: Processes,
        job_dir: Callable[[str], Path],
        refresh: Callable[[Job, float], None],
    ) -> None:
        """`refresh` takes up a job anew that has had a worker for so many seconds."""
        self.jobs = jobs
        self.fleet = Fleet(settings, leases, processes, self.put, self._on_job_message, self.background)
        self.scheduler = Scheduler(
            evaluators=settings.evaluators or None,
            evaluators_that_fit=evaluators_that_fit(machine_bytes()),
            max_attempts=settings.max_attempts,
            max_workers_per_gpu=settings.max_workers_per_gpu,
            max_gpus=settings.max_gpus,
            idle_worker_s=settings.idle_worker_s or None,
            patience_s=settings.patience_s,
        )
        self._settings = settings
        self._leases = leases
        leases.at_rest = self.scheduler.ledger.at_rest
        self._job_dir = job_dir
        self._refresh = refresh
        self._events: asyncio.Queue[tuple[ev.Event, asyncio.Future[None] | None]] = asyncio.Queue()
        self._loop: asyncio.Task[None] | None = None
        self._stopping = False
        self._outcomes: dict[str, msg.JobDone | msg.JobFailed] = {}
        """What evaluators reported at the end of a job, until the loop has taken it in."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._given: set[str] = set()
        """Jobs that the scheduler has been given."""
        self._ending: dict[str, ev.Demand | None] = {}
        """Jobs that end before it is given them, with what it was to be given meanwhile."""

    # ------------------------------------------------------------------ the loop

    def start(self) -> asyncio.Task[None]:
        """Start the loop; the task ends after `stop`, or with what went wrong."""
        self._loop = asyncio.create_task(self._run(), name="runner")
        return self._loop

    async def _run(self) -> None:
        while not self._stopping:
            event, done = await self._events.get()
            for action in self.scheduler.step(event):
                await self._perform(action)
            if done is not None and not done.done():
                done.set_result(None)

    def put(self, event: type[ev.Event], **fields: Any) -> None:
        """Queue an event that happened now."""
        self._events.put_nowait((event(now=time.monotonic(), **fields), None))

    async def handle(self, event: type[ev.Event], **fields: Any) -> None:
        """Queue an event that happened now, and return when what follows from it is done. Raises ShuttingDown."""
        if self._stopping:
            raise ShuttingDown
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events.put_nowait((event(now=time.monotonic(), **fields), done))
        await done

    async def look(self) -> None:
        """Let the scheduler know what the hardware shows now, and the models' files where jobs may have to pause."""
        running = list(self.scheduler.ledger.running.values())
        if self.scheduler.placer.heads or any(not run.workers for run in running):
            specs, memo = [run.demand.spec for run in running], memo_path(self._settings.data_dir)
            self.put(ev.ModelsSeen, changed=await asyncio.to_thread(changed_models, specs, memo))
        slots = await self._leases.look()
        contested = self._leases.contested() if self._settings.yield_to_foreign else frozenset[str]()
        self.put(ev.SlotsSeen, slots=slots, lost=self._leases.lost(), contested=contested)

    def submit(self, demand: ev.Demand) -> None:
        """Let the scheduler have a queued job whose model is known now, unless the job has ended meanwhile."""
        job_id = demand.job_id
        self.jobs.identified(job_id, demand.spec)
        if job_id in self._ending:
            self._ending[job_id] = demand
        elif job_id in self.jobs:
            self._given.add(job_id)
            self.put(ev.JobSubmitted, demand=demand)

    async def settle_queued(self, job_id: str, event: JobEvent, error: str | None) -> None:
        """End a job that the scheduler has not been given yet; others are left alone."""
        job = self.jobs.get(job_id)
        if job and job_id not in self._given | self._ending.keys():
            self._ending[job_id] = None
            try:
                await self.jobs.settle(job, event, error)
            finally:
                if demand := self._ending.pop(job_id):
                    self.submit(demand)

    async def cancel(self, job_id: str) -> None:
        """End a job wherever it is; durable on return. Raises ShuttingDown, DatabaseUnavailable."""
        await self.settle_queued(job_id, JobEvent.CANCEL, None)  # while its model is still being looked at
        await self.handle(ev.CancelRequested, job_id=job_id)
        await self.settle_queued(job_id, JobEvent.CANCEL, None)  # it has gone back to that meanwhile

    def ran_seconds(self, job_id: str) -> float | None:
        """How long a running job has had a worker; None while it has none."""
        run = self.scheduler.ledger.running.get(job_id)
        return run.ran(time.monotonic()) if run and run.working_since is not None else None

    def background(self, work: Awaitable[Any]) -> None:
        """Run beside the loop; what goes wrong is logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, DatabaseUnavailable):  # the server ends
            logger.warning("not all of what happened could be written: %s", error.reason)
        else:
            logger.error("a background task failed", exc_info=error)

    async def stop(self) -> None:
        """End every process; running jobs go back to the queue, those being cancelled are cancelled."""
        self._stopping = True
        self.put(ev.Tick)
        if self._loop:
            await asyncio.gather(self._loop, return_exceptions=True)
        while not self._events.empty():  # whoever waits for one would wait for ever
            _, done = self._events.get_nowait()
            if done is not None and not done.done():
                done.set_exception(ShuttingDown())
        await self.fleet.stop()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._let_go_of_jobs()
        except DatabaseUnavailable as error:  # they stay as they are there, and the next start takes them back
            logger.error("running jobs are left as they are: %s", error.reason)

    async def _let_go_of_jobs(self) -> None:
        for job in list(self.jobs.values()):
            if job.state is JobState.RUNNING:
                await self.jobs.requeue(job, "the server was stopped")
            elif job.state is JobState.CANCELLING:
                await self.jobs.settle(job, JobEvent.RELEASED)

    # ------------------------------------------------------------------ actions

    async def _perform(self, action: ev.Action) -> None:
        match action:
            case ev.StartEvaluator(evaluator_id=evaluator_id):
                self.background(self.fleet.start_evaluator(evaluator_id))
            case ev.KillEvaluator(evaluator_id=evaluator_id):
                self.fleet.kill_evaluator(evaluator_id)
            case ev.StartWorker(slot_ids=slot_ids):
                await self.fleet.start_worker(action, [self.scheduler.ledger.slots[slot_id] for slot_id in slot_ids])
            case ev.StopWorker(worker_id=worker_id):
                self.fleet.stop_worker(worker_id)
            case ev.KillWorker(worker_id=worker_id):
                self.fleet.kill_worker(worker_id)
            case ev.ReclaimSlots():
                self.background(self._reclaim(action))
            case ev.StartJob():
                await self._start_job(action)
            case ev.Attach():
                self.fleet.attach(action)
            case ev.Detach():
                self.fleet.detach(action)
            case ev.NoteLoss(job_id=job_id, cause=cause):
                if job := self.jobs.get(job_id):  # beside the loop: a database that is away keeps nobody from working
                    self.background(self.jobs.note_loss(job, cause))
            case ev.DropJob(worker_id=worker_id, job_id=job_id):
                self.fleet.drop(worker_id, job_id)
            case ev.BeginCancel(job_id=job_id):
                if job := self.jobs.get(job_id):
                    await self.jobs.change(job, JobEvent.CANCEL)
            case ev.ConcludeJob(job_id=job_id):
                await self._conclude(self.jobs[job_id])
            case ev.SettleJob(job_id=job_id, outcome=outcome, error=error):
                if job := self.jobs.get(job_id):
                    await self._settle(job, _settling(job.state, outcome), error)
            case ev.RequeueJob(job_id=job_id, cause=cause):
                if job := self.jobs.get(job_id):
                    await self.jobs.requeue(job, cause, uses_retry=True)
            case ev.RefreshModel(job_id=job_id, cause=cause, ran_s=ran_s):
                if job := self.jobs.get(job_id):
                    waiting = await self.jobs.requeue(job, cause)
                    self._given.discard(job_id)  # not before: whoever ends it next, ends one that waits
                    self._refresh(waiting, ran_s)
            case _:
                assert_never(action)

    async def _reclaim(self, action: ev.ReclaimSlots) -> None:
        try:
            await asyncio.sleep(action.rest_s)
            await self._leases.reclaim(action.worker_id)
            if self._leases.has_gpus:  # what was seen while the worker was there says nothing of the slots now
                await self.look()
        finally:  # or nobody would ever use the slots again
            self.put(ev.SlotsReturned, worker_id=action.worker_id)

    # ------------------------------------------------------------------ what evaluators say of jobs

    async def _on_job_message(self, message: JobMessage) -> None:
        match message:
            case msg.JobProgress(job_id=job_id, progress=progress):
                before = self.jobs[job_id].progress if job_id in self.jobs else None
                self.jobs.progressed(job_id, progress, self.ran_seconds(job_id))
                if progress.done > (before.done if before else 0):
                    self.put(ev.JobProgressed, job_id=job_id, done=progress.done)
            case msg.TaskDone(job_id=job_id, task=task, metrics=metrics, samples_path=path):
                if job := self.jobs.get(job_id):
                    samples = job.samples | ({task: path} if path else {})
                    # written beside this loop, which has to hear that the evaluator lives
                    self.background(self.jobs.note(job, metrics=job.metrics | {task: metrics}, samples=samples))
            case msg.JobDone(job_id=job_id) | msg.JobFailed(job_id=job_id):
                self._outcomes[job_id] = message
                changed = isinstance(message, msg.JobFailed) and message.content_changed
                self.put(ev.JobEnded, job_id=job_id, content_changed=changed)
            case _:
                assert_never(message)

    # ------------------------------------------------------------------ durable states

    async def _start_job(self, action: ev.StartJob) -> None:
        job = await self.jobs.start(self.jobs[action.job_id])
        try:
            self.fleet.tell(action.evaluator_id, self._run_job(job))
        except Exception as error:  # what is wrong with one job must not end the others
            logger.exception("job %s cannot be started", job.id)
            self._outcomes[job.id] = msg.JobFailed(job_id=job.id, error=f"it cannot be started: {error}")
            self.put(ev.JobEnded, job_id=job.id)
            self.put(ev.EvaluatorIsReady, evaluator_id=action.evaluator_id)

    def _run_job(self, job: Job) -> msg.RunJob:
        """What its evaluator is told; makes the folder for its results, or tells that nobody will be able to.

        Where there is merely no room for it now, the evaluator makes it when it has results, and waits for that.
        """
        assert job.model is not None
        folder = self._job_dir(job.id)
        output = Path(job.evaluation.output_dir) if job.evaluation.output_dir else folder / "results"
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
        return msg.RunJob(
            job_id=job.id,
            evaluation=job.evaluation,
            model=job.model,
            output_dir=str(output.resolve()),
            log_path=str(folder / "job.log"),
            submitted_at=job.created_at,
        )

    async def _conclude(self, job: Job) -> None:
        match self._outcomes.pop(job.id):
            case msg.JobDone(result=result, progress=progress):
                fields: dict[str, Any] = {"result": result, "metrics": result.metrics, "samples": result.samples}
                await self._settle(job, JobEvent.COMPLETE, progress=progress, **fields)
            case msg.JobFailed(error=error):
                await self._settle(job, JobEvent.FAIL, error)

    async def _settle(self, job: Job, event: JobEvent, error: str | None = None, **fields: Any) -> None:
        await self.jobs.settle(job, event, error, **fields)
        self._given.discard(job.id)
        self._outcomes.pop(job.id, None)


def _settling(state: JobState, outcome: str) -> JobEvent:
    """Which event of the table brings a job in this state to that outcome."""
    if outcome == "failed":
        return JobEvent.FAIL
    return JobEvent.RELEASED if state is JobState.CANCELLING else JobEvent.CANCEL

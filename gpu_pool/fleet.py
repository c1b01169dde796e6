"""The evaluators and workers that live: how they are started, told things, heard, and ended when they are late."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, assert_never

import msgspec

from gpu_pool import events as ev
from gpu_pool import messages as msg
from gpu_pool.hardware import Slot
from gpu_pool.leases import Leases
from gpu_pool.post_mortem import PostMortem
from gpu_pool.process_table import is_stopped
from gpu_pool.records import ModelSpec
from gpu_pool.settings import PoolSettings
from gpu_pool.stalls import Stalls
from gpu_pool.supervisor import Child
from gpu_pool.watchdog import Watchdog

MAX_RESTART_PAUSE_SECONDS = 30.0
"""Evaluators that die before they are ready are started again ever more slowly, up to this."""

DYING_SECONDS = 10.0
"""How long a worker whose connections have failed may take to turn out to be dead: giving back memory of GPUs, and
clearing away what it had started, take a while."""

logger = logging.getLogger(__name__)

EvaluatorChild = Child[msg.FromEvaluator]
WorkerChild = Child[msg.FromWorker]
JobMessage = msg.JobProgress | msg.TaskDone | msg.JobDone | msg.JobFailed
"""What an evaluator says of its job; all else is about processes."""


class Processes(msgspec.Struct, kw_only=True):
    """How processes are started; the seam at which tests and other machines come in."""

    evaluator: Callable[[str], Awaitable[EvaluatorChild]]
    worker: Callable[[str, ModelSpec, list[Slot], int], Awaitable[WorkerChild]]
    """Its id, model and slots, and how much memory it may take of each slot (0: all)."""
    address: Callable[[str], str]
    """Where the worker of that id listens for evaluators."""


class Deadline(NamedTuple):
    """Something that is awaited of a worker for a limited time."""

    worker_id: str
    awaited: Literal["its model", "letting go", "last answers", "its end"]
    """Of these, a worker that is late with the first two is killed; last answers are computed by others; one that does
    not end cannot be reached by the job."""
    job_id: str | None = None
    """The job that it is to let go of, or to answer, or that has lost its connection to it."""


class Put(Protocol):
    """Queues an event that happened now."""

    def __call__(self, event: type[ev.Event], **fields: Any) -> None: ...


class Fleet:
    """Children by id, until they are dead; what happens to them becomes events."""

    def __init__(
        self,
        settings: PoolSettings,
        leases: Leases,
        processes: Processes,
        put: Put,
        hear: Callable[[JobMessage], Awaitable[None]],
        background: Callable[[Awaitable[Any]], None],
    ) -> None:
        """`hear` takes what evaluators say of jobs; `background` runs something beside the caller."""
        self.evaluators: dict[str, EvaluatorChild] = {}
        self.workers: dict[str, WorkerChild] = {}
        self.loaded: dict[str, msg.WorkerReady] = {}
        """What workers have said of themselves since their model is loaded."""
        self._settings = settings
        self._leases = leases
        self._processes = processes
        self._put = put
        self._hear = hear
        self._background = background
        self._timers: dict[Deadline, asyncio.TimerHandle] = {}
        self._stalls = Stalls()
        self._watchdogs: dict[str, Watchdog] = {}
        """Of all of them, by id."""
        self._post_mortem = PostMortem()
        self._failed_starts = 0

    # ------------------------------------------------------------------ starting and ending

    async def start_evaluator(self, evaluator_id: str) -> None:
        """Return when its process runs, or has not come to be."""
        if self._failed_starts:
            await asyncio.sleep(restart_pause(self._failed_starts))
        try:
            child = await self._processes.evaluator(evaluator_id)
        except OSError as error:  # no memory, no descriptors: later there may be
            self._failed_starts += 1
            self._put(ev.EvaluatorDied, evaluator_id=evaluator_id, cause=str(error))
            return
        self.evaluators[evaluator_id] = child
        self._watchdogs[evaluator_id] = Watchdog(child, self._settings.unresponsive_s)
        was_ready = False

        async def on_message(message: msg.FromEvaluator) -> None:
            nonlocal was_ready
            was_ready = was_ready or isinstance(message, msg.EvaluatorReady)
            await self._on_evaluator_message(evaluator_id, message)

        async def on_death(cause: str) -> None:
            del self.evaluators[evaluator_id], self._watchdogs[evaluator_id]
            self._failed_starts += not child.killed and not was_ready
            from_outside = self._post_mortem.is_from_outside(child)
            self._put(ev.EvaluatorDied, evaluator_id=evaluator_id, cause=cause, from_outside=from_outside)

        child.watch(on_message, on_death)

    async def start_worker(self, action: ev.StartWorker, slots: Sequence[Slot]) -> None:
        """Lease its slots and start it there."""
        worker_id = action.worker_id
        if reason := await self._leases.take(worker_id, action.slot_ids, action.memory_bytes):
            self._put(ev.LeaseRefused, worker_id=worker_id, reason=reason)
            return
        try:
            child = await self._processes.worker(worker_id, action.spec, list(slots), action.memory_bytes)
        except OSError as error:  # no memory, no descriptors: later there may be
            self._leases.release(worker_id)
            self._put(ev.LeaseRefused, worker_id=worker_id, reason=f"A worker could not be started: {error}")
            return
        self.workers[worker_id] = child
        self._watchdogs[worker_id] = Watchdog(child, self._settings.unresponsive_s)
        self._leases.started(worker_id, child.pid)
        limit_s = self._settings.worker_load_timeout_s
        self._kill_after(Deadline(worker_id, "its model"), limit_s, child, "did not load its model in time")

        async def on_message(message: msg.FromWorker) -> None:
            await self._on_worker_message(worker_id, message)

        async def on_death(cause: str) -> None:
            del self.workers[worker_id], self._watchdogs[worker_id]
            self.loaded.pop(worker_id, None)
            self._stalls.forget(worker_id)
            for deadline in [each for each in self._timers if each.worker_id == worker_id]:
                if deadline.awaited != "last answers":  # its evaluator is to stop waiting for them all the same
                    self._disarm(deadline)
            from_outside = self._post_mortem.is_from_outside(child)
            self._put(ev.WorkerDied, worker_id=worker_id, cause=cause, from_outside=from_outside)

        child.watch(on_message, on_death)

    def kill_evaluator(self, evaluator_id: str) -> None:
        """End it now."""
        if child := self.evaluators.get(evaluator_id):
            child.kill()

    def kill_worker(self, worker_id: str) -> None:
        """End it now."""
        if child := self.workers.get(worker_id):
            child.kill()

    def stop_worker(self, worker_id: str) -> None:
        """Ask it to end."""
        if child := self.workers.get(worker_id):
            self._background(child.stop())

    async def stop(self) -> None:
        """End all of them; returns when they are gone."""
        for timer in self._timers.values():
            timer.cancel()
        for child in self.evaluators.values():
            child.kill()
        stopping = [child.stop() for child in self.workers.values()]
        await asyncio.gather(*stopping, *(child.gone for child in self.evaluators.values()))

    # ------------------------------------------------------------------ telling

    def tell(self, evaluator_id: str, message: msg.ToEvaluator) -> None:
        """Send it, if the evaluator still lives."""
        if child := self.evaluators.get(evaluator_id):
            child.send(message)

    def attach(self, action: ev.Attach) -> None:
        """Let an evaluator use a worker."""
        job_id, worker_id = action.job_id, action.worker_id
        address = self._processes.address(worker_id)
        for of_an_earlier_use in ("last answers", "its end"):
            self._disarm(Deadline(worker_id, of_an_earlier_use, job_id))
        self.tell(action.evaluator_id, msg.AttachWorker(job_id=job_id, worker_id=worker_id, address=address))

    def detach(self, action: ev.Detach) -> None:
        """Ask for a worker back; where its answers take too long, others compute them again."""
        message = msg.DetachWorker(
            job_id=action.job_id,
            worker_id=action.worker_id,
            at_once=action.at_once,
            cause=action.cause,
            from_outside=action.from_outside,
        )
        self.tell(action.evaluator_id, message)
        if not message.at_once:
            again = msgspec.structs.replace(message, at_once=True)
            deadline = Deadline(action.worker_id, "last answers", action.job_id)
            self._arm(deadline, self._settings.drop_timeout_s, lambda: self.tell(action.evaluator_id, again))

    def drop(self, worker_id: str, job_id: str) -> None:
        """Let a worker forget a job's requests; one that does not is killed."""
        if child := self.workers.get(worker_id):
            child.send(msg.DropJob(job_id=job_id))
            deadline = Deadline(worker_id, "letting go", job_id)
            self._kill_after(deadline, self._settings.drop_timeout_s, child, f"did not let go of job {job_id}")

    def _kill_after(self, deadline: Deadline, seconds: float, child: WorkerChild, why: str) -> None:
        def kill() -> None:
            logger.error("%s %s and is killed", child.name, why)
            child.kill(f"it {why} and was killed")

        self._arm(deadline, seconds, kill)

    def _arm(self, deadline: Deadline, seconds: float, late: Callable[[], None]) -> None:
        """Do something when that time is over, in place of what was to be done before."""
        self._disarm(deadline)

        def fire() -> None:
            del self._timers[deadline]
            late()

        self._timers[deadline] = asyncio.get_running_loop().call_later(seconds, fire)

    def _disarm(self, deadline: Deadline) -> None:
        if timer := self._timers.pop(deadline, None):
            timer.cancel()

    # ------------------------------------------------------------------ hearing

    async def _on_evaluator_message(self, evaluator_id: str, message: msg.FromEvaluator) -> None:
        match message:
            case msg.EvaluatorReady(rss_bytes=rss):
                self._failed_starts = 0
                if rss > self._settings.evaluator_memory_bytes:
                    logger.info("%s uses %d MiB and is replaced", evaluator_id, rss >> 20)
                    self._background(self.evaluators[evaluator_id].stop())
                else:
                    self._put(ev.EvaluatorIsReady, evaluator_id=evaluator_id)
            case msg.WorkerDetached(job_id=job_id, worker_id=worker_id):
                self._disarm(Deadline(worker_id, "last answers", job_id))
                self._put(ev.WorkerGivenBack, job_id=job_id, worker_id=worker_id)
            case msg.AwaitingWorker(worker_id=worker_id):
                self._look_for_stall(worker_id)
            case msg.WorkerUnreachable(job_id=job_id, worker_id=worker_id, error=error):
                self._await_end(worker_id, job_id, error)
            case msg.Alive():
                self._watchdogs[evaluator_id].alive()
            case msg.EvaluatorFailed(error=error):
                self.evaluators[evaluator_id].why = error
            case msg.Catalogue() | msg.TasksChecked():
                logger.error("%s answered a question that only the desk is asked", evaluator_id)
            case msg.JobProgress() | msg.TaskDone() | msg.JobDone() | msg.JobFailed():
                await self._hear(message)
            case _:
                assert_never(message)

    async def _on_worker_message(self, worker_id: str, message: msg.FromWorker) -> None:
        match message:
            case msg.WorkerReady():
                self._disarm(Deadline(worker_id, "its model"))
                self._leases.loaded(worker_id, message.memory_bytes)
                self.loaded[worker_id] = message
                self._put(ev.WorkerLoaded, worker_id=worker_id)
            case msg.LoadFailed(error=error, content_changed=changed):
                self._disarm(Deadline(worker_id, "its model"))
                crowded = await self._leases.crowded(worker_id) if message.out_of_memory else None
                if crowded:
                    logger.warning("%s lacks memory beside other processes (%s): %s", worker_id, crowded, error)
                what = {"error": error, "content_changed": changed, "crowded": bool(crowded)}
                self._put(ev.WorkerLoadFailed, worker_id=worker_id, **what)
            case msg.BatchProgress():
                self._stalls.progressed(worker_id, time.monotonic())
            case msg.Alive():
                self._watchdogs[worker_id].alive()
            case msg.WorkerFailed(error=error):
                self.workers[worker_id].why = error
            case msg.Dropped(job_id=job_id):
                self._disarm(Deadline(worker_id, "letting go", job_id))
                self._put(ev.WorkerDroppedJob, worker_id=worker_id, job_id=job_id)
            case _:
                assert_never(message)

    def _await_end(self, worker_id: str, job_id: str, error: str) -> None:
        """A connection to this worker failed: mostly since it is dying, and how it ended is known in a moment."""
        if worker_id in self.workers:
            what = {"worker_id": worker_id, "job_id": job_id, "cause": error}
            deadline = Deadline(worker_id, "its end", job_id)
            self._arm(deadline, DYING_SECONDS, lambda: self._put(ev.WorkerUnreachable, **what))

    def _look_for_stall(self, worker_id: str) -> None:
        """An evaluator waits for this worker in silence: kill it if it hangs."""
        child, limit = self.workers.get(worker_id), self._settings.worker_stall_s
        if child and self._stalls.awaited(worker_id, time.monotonic()) >= limit:
            logger.error("%s has made no progress for %g s and is killed", worker_id, limit)
            why = f"it made no progress for {limit:g} s (worker_stall_s) and was killed"
            child.kill(why, from_outside=is_stopped(child.pid))


def restart_pause(failed_starts: int) -> float:
    """Seconds before the next evaluator is started, when so many in a row died before they were ready."""
    doublings = min(failed_starts, math.ceil(math.log2(MAX_RESTART_PAUSE_SECONDS)))  # a night of failures has thousands
    return min(MAX_RESTART_PAUSE_SECONDS, 2.0**doublings)

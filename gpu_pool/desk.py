"""The front desk: one evaluator process that runs no job, so that submissions can always be checked at once."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Set
from typing import assert_never

from gpu_pool import messages as msg
from gpu_pool.errors import PoolError
from gpu_pool.records import Modality
from gpu_pool.supervisor import Child
from gpu_pool.watchdog import Watchdog

RESTART_SECONDS = 2.0
"""Pause before a desk that ended by itself is started again."""

logger = logging.getLogger(__name__)


class DeskUnavailable(PoolError):
    """The process that checks submissions ended; try again."""


class Desk:
    """Keeps one evaluator alive and asks it questions."""

    def __init__(self, spawn: Callable[[str], Awaitable[Child[msg.FromEvaluator]]], unresponsive_s: float) -> None:
        self._spawn = spawn
        self._unresponsive_s = unresponsive_s
        self._child: Child[msg.FromEvaluator] | None = None
        self._ready = asyncio.Event()
        self._catalogue: asyncio.Future[tuple[msg.TaskEntry, ...]] = asyncio.get_running_loop().create_future()
        self._questions: dict[int, asyncio.Future[tuple[msg.TaskProblem, ...]]] = {}
        self._numbers = itertools.count()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Its process, while it lives."""
        return self._child.pid if self._child else None

    def start(self) -> asyncio.Task[None]:
        """Keep it alive in the background; the task ends only when cancelled."""
        self._task = asyncio.create_task(self._keep_alive(), name="desk")
        return self._task

    async def stop(self) -> None:
        """End it."""
        self._stopping = True
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._child:
            await self._child.stop()

    async def wait_ready(self) -> None:
        """Return when it has indexed all tasks."""
        await self._ready.wait()

    async def catalogue(self) -> tuple[msg.TaskEntry, ...]:
        """Every task, group and tag; waits until the first index is built."""
        return await asyncio.shield(self._catalogue)

    async def check(
        self,
        tasks: tuple[str, ...],
        num_fewshot: int | None,
        modalities: Set[Modality],
        *,
        no_scores: str | None = None,
    ) -> tuple[msg.TaskProblem, ...]:
        """What is wrong with these tasks for a model that takes these modalities, and gives no log-likelihoods for the
        reason `no_scores`, or does (None).

        Raises:
            DeskUnavailable: the process ends meanwhile.
        """
        await self._ready.wait()
        assert self._child is not None
        number = next(self._numbers)
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._child.send(
            msg.CheckTasks(
                check_id=number,
                tasks=tasks,
                num_fewshot=num_fewshot,
                modalities=tuple(sorted(modalities)),
                no_scores=no_scores,
            )
        )
        try:
            return await answer
        finally:
            del self._questions[number]

    async def _keep_alive(self) -> None:
        while True:
            try:
                self._child = await self._spawn("desk")
            except OSError as error:  # no memory, no descriptors: later there may be
                logger.warning("the desk process cannot be started: %s", error)
            else:
                self._watchdog = Watchdog(self._child, self._unresponsive_s)
                await asyncio.shield(self._child.watch(self._on_message, self._on_death))
            await asyncio.sleep(RESTART_SECONDS)

    async def _on_message(self, message: msg.FromEvaluator) -> None:
        assert self._child is not None
        match message:
            case msg.EvaluatorReady():
                self._child.send(msg.BuildCatalogue())
            case msg.Catalogue(entries=entries):
                if not self._catalogue.done():
                    self._catalogue.set_result(entries)
                self._ready.set()
            case msg.TasksChecked(check_id=number, problems=problems):
                if (answer := self._questions.get(number)) and not answer.done():
                    answer.set_result(problems)
            case msg.Alive():
                self._watchdog.alive()
            case msg.EvaluatorFailed(error=error):
                self._child.why = error
            case (
                msg.JobProgress()
                | msg.WorkerDetached()
                | msg.AwaitingWorker()
                | msg.WorkerUnreachable()
                | msg.TaskDone()
                | msg.JobDone()
                | msg.JobFailed()
            ):
                logger.error("the desk runs no jobs, but said %r", message)
            case _:
                assert_never(message)

    async def _on_death(self, cause: str) -> None:
        self._ready.clear()
        self._child = None
        if not self._stopping:
            logger.warning("the desk process ended: %s", cause)
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(DeskUnavailable())

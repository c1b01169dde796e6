"""Jobs that may be in the database although nobody was told so: their commit was lost sight of, and patience ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.records import Job

TakeUp = Callable[[Job], Awaitable[None]]
"""What is done with a job that is durable and that nobody has taken up."""


class LateCommits:
    """Looks for such jobs until it is known whether they were written; each that was is taken up once."""

    def __init__(self, look: Callable[[str], Awaitable[Job | None]]) -> None:
        """`look` returns the job of an id, if there is one, when the database can be used again.

        It raises DatabaseUnavailable when the server ends: the next one takes up what it finds.
        """
        self._look = look
        self._unsure: dict[str, TakeUp] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def look_for(self, job_id: str, take_up: TakeUp) -> None:
        """Begin to look for it."""
        self._unsure[job_id] = take_up
        task = asyncio.create_task(self._find(job_id), name=f"look for job {job_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def seen(self, job: Job | None) -> None:
        """A job was read from the database, for whatever reason."""
        if job and (take_up := self._unsure.pop(job.id, None)):
            await take_up(job)

    async def close(self) -> None:
        """Look for nothing any more."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _find(self, job_id: str) -> None:
        with suppress(DatabaseUnavailable):
            await self.seen(await self._look(job_id))
        self._unsure.pop(job_id, None)

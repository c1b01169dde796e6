"""Deletes jobs that ended long ago, as the operator's settings say, in small batches beside the service."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from gpu_pool.errors import DatabaseUnavailable
from gpu_pool.records import JobState
from gpu_pool.settings import PoolSettings
from gpu_pool.store import Store

PASS_SECONDS = 600.0
"""Between two looks for what is to be deleted."""
BATCH = 50
"""Jobs deleted in one transaction: some milliseconds, in which others wait."""

logger = logging.getLogger(__name__)


class Retention:
    """What is deleted: the job's rows and its folder under the data folder, never files elsewhere (`output_dir`)."""

    def __init__(
        self, settings: PoolSettings, store: Store, forget: Callable[[Mapping[JobState, int]], None], folder: Path
    ) -> None:
        """`folder` holds the jobs' folders; `forget` is told how many jobs of each state are gone."""
        self._days = settings.retention_days
        self._jobs = settings.retention_jobs
        self._store = store
        self._forget = forget
        self._folder = folder

    async def run(self) -> None:
        """Look again and again; ends at once when everything is kept."""
        while self._days is not None or self._jobs is not None:
            try:
                if deleted := await self.delete_expired(datetime.now(UTC)):
                    logger.info("%d ended jobs were deleted (retention)", deleted)
            except DatabaseUnavailable as error:
                logger.warning("ended jobs are not deleted now: %s", error.reason)
            await asyncio.sleep(PASS_SECONDS)

    async def delete_expired(self, now: datetime) -> int:
        """Delete all that is to go by `now`; returns how many jobs."""
        before = None if self._days is None else now - timedelta(days=self._days)
        total = 0
        while job_ids := await self._store.expired(before, self._jobs, BATCH):
            # Files first: a job without files is found again at the next look, files without a job never.
            await asyncio.to_thread(self._remove_folders, job_ids)
            deleted = await self._store.delete(job_ids)
            self._forget(deleted)
            total += sum(deleted.values())
        return total

    def _remove_folders(self, job_ids: list[str]) -> None:
        for job_id in job_ids:
            folder = self._folder / job_id
            if folder.parent != self._folder or folder.name != job_id or job_id == "..":
                logger.error("job %r has an id that is no folder's name; its files are left", job_id)
            elif os.path.islink(folder):  # put there by a person, who keeps what it points to
                try:
                    folder.unlink()
                except OSError as error:
                    logger.warning("%s cannot be deleted: %s", folder, error)
            else:
                shutil.rmtree(folder, onerror=_log_unless_gone)


def _log_unless_gone(function: object, path: str, problem: tuple[type[BaseException], BaseException, object]) -> None:
    if not isinstance(problem[1], FileNotFoundError):
        logger.warning("%s cannot be deleted: %s", path, problem[1])

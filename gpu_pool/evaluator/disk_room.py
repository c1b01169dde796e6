"""A full disk is waited for: what a job has computed is not lost because there is no room for it now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from gpu_pool.errors import DISK_FULL

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 10.0
"""Each try writes until the disk is full once more, which is in the way of everybody else there."""

ResultT = TypeVar("ResultT")
_log = logging.getLogger(__name__)


class DiskRoom:
    """Has files of one job written, however long there is no room for them: who gives up ends the process."""

    def __init__(self, waits_for: Callable[[str | None], None]) -> None:
        """`waits_for` is told what a write waits for, for people, and None when it waits no longer."""
        self._waits_for = waits_for

    def wait(self, write: Callable[[], ResultT]) -> ResultT:
        """What `write` returns. It leaves nothing behind when it fails, and is tried again while its disk is full.

        Raises OSError for everything else that is wrong.
        """
        reason: str | None = None
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                written = write()
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                if reason is None:
                    reason = f"{error.strerror}: {error.filename!r}; make room there, and the job goes on by itself"
                    _log.error("%s", reason)
                    self._waits_for(reason)
            else:
                if reason is not None:
                    _log.info("There is room again")
                    self._waits_for(None)
                return written
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

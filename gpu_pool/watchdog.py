"""Finds a process that hangs or is stopped: it is asked whether it lives, and killed when it owes the answer for long.

A thread answers that does nothing but take the server's messages, whatever the others load or compute; it says nothing
while one of a worker's ranks is stopped. Of workers that have loaded more is expected, see `stalls`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from gpu_pool.messages import Ping
from gpu_pool.process_table import is_stopped
from gpu_pool.supervisor import Child

QUESTIONS = 4
"""Within the time that an answer may take."""
LATE_SECONDS = 1.0
"""A timer that comes so much later was kept up by the server itself: what has been said meanwhile is not heard yet."""

logger = logging.getLogger(__name__)


class Watchdog:
    """Asks one process, until it is gone."""

    def __init__(self, child: Child[Any], limit_s: float) -> None:
        self._child = child
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._ask()
        child.gone.add_done_callback(lambda _: self._timer.cancel())

    def alive(self) -> None:
        """The process has answered."""
        self._timer.cancel()
        self._timer = self._loop.call_later(self._limit_s / QUESTIONS, self._ask)

    def _ask(self) -> None:
        self._child.send(Ping())
        self._wait()

    def _wait(self) -> None:
        self._timer = self._loop.call_at(self._loop.time() + self._limit_s, self._late)

    def _late(self) -> None:
        if self._loop.time() - self._timer.when() > LATE_SECONDS:
            self._wait()
            return
        logger.error("%s has not answered for %g s and is killed", self._child.name, self._limit_s)
        why = f"it did not answer for {self._limit_s:g} s (unresponsive_s) and was killed"
        self._child.kill(why, from_outside=is_stopped(self._child.pid))

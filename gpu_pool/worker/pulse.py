"""What the server goes by to tell a worker that computes from one that hangs: each batch or step, as it begins."""

from __future__ import annotations

import time
from collections.abc import Callable

from gpu_pool.messages import BatchProgress

INTERVAL_SECONDS = 1.0
"""At most one report in so long: steps take milliseconds, and the server's patience is counted in minutes."""


class Pulse:
    """Only for the computing thread: no other may report for it."""

    def __init__(self, send: Callable[[BatchProgress], None], now: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._now = now
        self._reported = float("-inf")

    def beat(self) -> None:
        """A batch or step begins."""
        now = self._now()
        if now - self._reported >= INTERVAL_SECONDS:
            self._reported = now
            self._send(BatchProgress())

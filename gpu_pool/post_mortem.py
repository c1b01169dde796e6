"""Whether a process that was killed says anything of the job that it worked for."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from gpu_pool.machine_memory import oom_kills
from gpu_pool.supervisor import Child

KILLS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)
"""What people and their tools end processes with; a process that fails gets others, or exits."""


class PostMortem:
    """Looks at processes that have ended, one after the other."""

    def __init__(self, oom_kills: Callable[[], int] = oom_kills) -> None:
        """`oom_kills()`: how many processes were killed here for want of memory so far."""
        self._oom_kills = oom_kills
        self._known = oom_kills()

    def is_from_outside(self, child: Child[Any]) -> bool:
        """Whether somebody stopped or killed it, other than we ourselves, and the kernel when memory ran out."""
        known, self._known = self._known, self._oom_kills()
        is_kill = child.exitcode is not None and -child.exitcode in KILLS
        return child.was_stopped or (is_kill and not child.killed and self._known == known)

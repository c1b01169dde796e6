"""Who claims a request: a process, named so that everybody on the machine can tell whether it still lives."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_numbers = itertools.count()


def new_owner() -> str:
    """A name for one holder of claims in this process: "<pid>/<start time>/<number>"."""
    pid = os.getpid()
    return f"{pid}/{_start_time(pid)}/{next(_numbers)}"


def is_alive(owner: str) -> bool:
    """Whether the owner's process still runs; a number that was given to another process since is told apart."""
    pid, start_time, _ = owner.split("/")
    now = _start_time(int(pid))
    return now is not None and str(now) == start_time


def _start_time(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when it has ended, reaped or not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command before it may contain anything; proc(5)
    return None if fields[0] in "ZX" else int(fields[19])

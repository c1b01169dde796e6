"""Whose process a pid is, as the kernel's process table tells it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

_INITIAL_PID_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO of linux/proc_ns.h


class ProcessTable:
    """Looks at `/proc`, a few files at a question."""

    def __init__(self, proc: Path = Path("/proc"), *, in_container: bool | None = None) -> None:
        """`in_container`: whether pids from elsewhere may mean nothing here; None: find out."""
        self._proc = proc
        self.in_container = _in_pid_namespace(proc) if in_container is None else in_container
        """Whether this is a process namespace of its own, so that the driver may show numbers of the host's."""

    def leader_of(self, pid: int, leaders: Collection[int]) -> int | None:
        """The process among `leaders` whose descendant `pid` is, or whose session it is in (also when that is dead).

        A worker leads a session: its ranks and what they start stay in it, orphaned or not, unless they leave it on
        purpose; those that do are found by their ancestors.
        """
        seen: set[int] = set()
        while pid not in leaders:
            found = self._parent_and_session(pid)
            if found is None or pid in seen:
                return None
            seen.add(pid)
            pid, session = found
            if session in leaders:
                return session
        return pid

    def exists(self, pid: int) -> bool:
        """Whether a process has this number here. Asks for no file: `/proc` may hide what other users run."""
        try:
            os.kill(pid, 0)
        except PermissionError:
            return True
        except (ProcessLookupError, OverflowError):
            return False
        return True

    def _parent_and_session(self, pid: int) -> tuple[int, int] | None:
        try:
            stat = (self._proc / str(pid) / "stat").read_text(errors="replace")
        except OSError:
            return None
        # proc(5): pid (name) state ppid pgrp session …; the name may hold anything, parentheses too
        _, parent, _, session, *_ = stat.rpartition(")")[2].split()
        return int(parent), int(session)


def _in_pid_namespace(proc: Path) -> bool:
    try:
        return str((proc / "self/ns/pid").readlink()) != _INITIAL_PID_NAMESPACE
    except OSError:
        return True

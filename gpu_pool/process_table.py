"""Whose process a pid is, as the kernel's process table tells it."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

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
        found = _stat(self._proc / str(pid))
        return None if found is None else (found.parent, found.session)


class _Stat(NamedTuple):
    state: str
    parent: int
    session: int


def _stat(folder: Path) -> _Stat | None:
    """What the kernel says of a process; None when it is gone."""
    try:
        stat = (folder / "stat").read_text(errors="replace")
    except OSError:
        return None
    # proc(5): pid (name) state ppid pgrp session …; the name may hold anything, parentheses too
    state, parent, _, session, *_ = stat.rpartition(")")[2].split()
    return _Stat(state, int(parent), int(session))


def is_stopped(leader: int) -> bool:
    """Whether somebody has stopped (SIGSTOP) the process that leads this session, or another one in it, like a rank.

    Those do nothing until they are continued, nor do others that wait for them.
    """
    found = (_stat(folder) for folder in Path("/proc").glob("[0-9]*"))
    return any(stat is not None and stat.session == leader and stat.state in ("T", "t") for stat in found)


def _in_pid_namespace(proc: Path) -> bool:
    try:
        return str((proc / "self/ns/pid").readlink()) != _INITIAL_PID_NAMESPACE
    except OSError:
        return True

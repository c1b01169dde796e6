"""All that a child process starts, directly or not: found by a mark in its environment, or by its session, and ended.

What a task's code forks or starts knows nothing of us. It inherits the environment that its ancestor was started with,
whatever group or session it moves to, and whoever its parent has become; where it is given another environment, as
sandboxes do, it is still in its ancestor's session. What changes both on purpose is not found.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

VARIABLE = "STARTED_BY_EVALPOOL"
"""Holds the mark, as "<server's>/<child's>"."""
SWEEP_SECONDS = 5.0
"""How long to wait for `end_all`, some 10 ms as a rule: the kernel makes whoever asks for the environment of a process
wait when that is stuck."""
_ROUNDS = 100
"""Looks for what was forked since the last one: it ends unless somebody forks faster than we look."""


@contextmanager
def marked(mark: str) -> Generator[None]:
    """What is started meanwhile, by any thread, is marked with "<server's>/<child's>" `mark`; later, as the server's.

    The variable stays, or the C library would move its table of them, under the eyes of other threads.
    """
    os.environ[VARIABLE] = mark
    try:
        yield
    finally:
        os.environ[VARIABLE] = mark.partition("/")[0]


def end_all(mark: str, sessions: Collection[int] = ()) -> set[int]:
    """SIGKILL to every process that has this mark (a server's: one of its children's), or is in one of `sessions`.

    Returns their pids. They are gone soon; processes of other users are left alone, and so are this one and those that
    it descends from: none of them was left by a server that is gone.
    """
    ended: set[int] = set()
    line = set(_line(os.getpid()))
    for _ in range(_ROUNDS):
        found = set(_find(mark, sessions)) - ended - line
        if not found:
            break
        for pid in found:
            _end(pid, mark, sessions)
        ended |= found
    return ended


def _find(mark: str, sessions: Collection[int]) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        with suppress(OSError):  # it ended meanwhile
            if entry.name.isdecimal() and entry.stat().st_uid == os.geteuid():
                pid = int(entry.name)
                if _belongs(pid, mark, sessions):
                    yield pid


def _belongs(pid: int, mark: str, sessions: Collection[int]) -> bool:
    """Raises OSError when the process is gone."""
    stat = _Stat.of(pid)
    if stat.state in "ZX":
        return False
    if stat.session in sessions:
        return True
    if not mark:  # the variable is empty where there was a server before
        return False
    entry = f"{VARIABLE}={mark}".encode()
    return any(
        variable == entry or variable.startswith(entry + b"/")
        for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


def _line(pid: int) -> Iterator[int]:
    """It, its parent, the parent of that, and so on, as far as this process may see."""
    with suppress(OSError):
        while pid:
            yield pid
            pid = _Stat.of(pid).parent


class _Stat(NamedTuple):
    state: str
    parent: int
    session: int

    @classmethod
    def of(cls, pid: int) -> _Stat:
        """Raises OSError when the process is gone."""
        # proc(5): pid (name) state ppid pgrp session …; the name may hold anything, parentheses too
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, parent, _, session, *_ = text.rpartition(")")[2].split()
        return cls(state, int(parent), int(session))


def _end(pid: int, mark: str, sessions: Collection[int]) -> None:
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _belongs(pid, mark, sessions):  # looked at once more: the number cannot come to mean another now
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)

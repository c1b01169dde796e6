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

VARIABLE = "STARTED_BY_EVALPOOL"
"""Holds the mark, as "<server's>/<child's>"."""
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

    Returns their pids. They are gone soon; processes of other users are left alone.
    """
    ended: set[int] = set()
    for _ in range(_ROUNDS):
        found = set(_find(mark, sessions)) - ended
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
                if pid != os.getpid() and _belongs(pid, mark, sessions):
                    yield pid


def _belongs(pid: int, mark: str, sessions: Collection[int]) -> bool:
    """Raises OSError when the process is gone."""
    folder = Path(f"/proc/{pid}")
    state, _, _, session, *_ = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    if state in "ZX":
        return False
    if int(session) in sessions:
        return True
    entry = f"{VARIABLE}={mark}".encode()
    return any(
        variable == entry or variable.startswith(entry + b"/")
        for variable in (folder / "environ").read_bytes().split(b"\0")
    )


def _end(pid: int, mark: str, sessions: Collection[int]) -> None:
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _belongs(pid, mark, sessions):  # looked at once more: the number cannot come to mean another now
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)

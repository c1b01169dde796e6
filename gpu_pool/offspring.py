"""All that a child process starts, directly or not: found by a mark that it inherits, and ended.

What a task's code forks or starts knows nothing of us. It inherits the mark twice: in its environment, and as a
resource limit that limits nothing and follows it into any group, session or environment, whoever its parent has become.
What changes both on purpose is not found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import signal
from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VARIABLE = "STARTED_BY_EVALPOOL"
"""Holds the mark, as "<server's>/<child's>"."""
SWEEP_SECONDS = 5.0
"""How long to wait for `end_all`, some 10 ms as a rule: the kernel makes whoever asks for the environment of a process
wait when that is stuck."""
_LIMIT, _LIMIT_NAME = resource.RLIMIT_RTTIME, "Max realtime timeout"
"""Microseconds of real-time scheduling without a pause: ours are more than 100,000 years."""
_CHILD_BITS = 32
_ROUNDS = 100
"""Looks for what was forked since the last one: it ends unless somebody forks faster than we look."""

_log = logging.getLogger(__name__)


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


@contextmanager
def hidden(names: Collection[str]) -> Generator[None]:
    """What is started meanwhile, by any thread, finds these variables empty: keys that are not for it.

    They stay, for the same reason.
    """
    values = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(values, ""))
    try:
        yield
    finally:
        os.environ.update(values)


def mark_process(pid: int, mark: str) -> None:
    """Mark a process that has just been started, and so all that it will start, in a way that no environment hides."""
    try:
        _, most = resource.prlimit(pid, _LIMIT)
        resource.prlimit(pid, _LIMIT, (_number(mark), most))
    except (OSError, ValueError) as error:  # it has ended; or there is a limit already
        _log.info("process %d is marked in its environment only: %s", pid, error)


def end_all(mark: str) -> set[int]:
    """SIGKILL to every process that has this mark (a server's: one of its children's).

    Returns their pids. They are gone soon; processes of other users are left alone, and so are this one and those that
    it descends from: none of them was left by a server that is gone. Where `/proc` shows the numbers of another process
    namespace, which here mean others or nobody, nothing is ended.
    """
    ended: set[int] = set()
    if not proc_is_ours():
        return ended
    line = set(_line(os.getpid()))
    for _ in range(_ROUNDS):
        found = set(_find(mark)) - ended - line
        if not found:
            break
        for pid in found:
            _end(pid, mark)
        ended |= found
    return ended


def proc_is_ours() -> bool:
    """Whether the numbers in `/proc` are those by which this process knows others."""
    try:
        status = Path("/proc/self/status").read_text(errors="replace")
    except OSError:
        return False
    # proc(5): this process's number in the namespace of /proc, and in those within that this process is in
    return all(len(line.split()) == 2 for line in status.splitlines() if line.startswith("NSpid:"))


def _find(mark: str) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        with suppress(OSError):  # it ended meanwhile
            if entry.name.isdecimal() and entry.stat().st_uid == os.geteuid():
                pid = int(entry.name)
                if _belongs(pid, mark):
                    yield pid


def _belongs(pid: int, mark: str) -> bool:
    """Raises OSError when the process is gone."""
    if not mark:  # the variable is empty where there was a server before
        return False
    state, _ = _state_and_parent(pid)
    return state not in "ZX" and (_has_limit(pid, mark) or _has_variable(pid, mark))


def _has_limit(pid: int, mark: str) -> bool:
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    [soft] = [line.removeprefix(_LIMIT_NAME).split()[0] for line in limits if line.startswith(_LIMIT_NAME)]
    if not soft.isdecimal():  # unlimited
        return False
    unimportant = 0 if "/" in mark else _CHILD_BITS
    return int(soft) >> unimportant == _number(mark) >> unimportant


def _number(mark: str) -> int:
    """The mark as a limit: it is huge, and its lower bits are those of the child."""
    server, _, child = mark.partition("/")
    return 1 << 62 | (_digest(server) >> 2) << _CHILD_BITS | _digest(child)


def _digest(text: str) -> int:
    """32 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


def _has_variable(pid: int, mark: str) -> bool:
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
            _, pid = _state_and_parent(pid)


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Raises OSError when the process is gone."""
    # proc(5): pid (name) state ppid …; the name may hold anything, parentheses too
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    state, parent, *_ = text.rpartition(")")[2].split()
    return state, int(parent)


def _end(pid: int, mark: str) -> None:
    with suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            if _belongs(pid, mark):  # looked at once more: the number cannot come to mean another now
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)

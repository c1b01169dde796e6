"""The first things every child process does: die with its parent, lead its own group, write to its own log."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent ends, and end now if it already has.

    Forked grandchildren do not inherit this: call it in them too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


class _Output(io.FileIO):
    """A descriptor that takes everything: on a full disk what is said is lost, and not the work of whoever says it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def forgive_output() -> None:
    """Let nothing that this process prints or logs raise OSError."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        getattr(sys, name).flush()
        raw = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True))


def redirect_output(path: str | os.PathLike[str]) -> None:
    """Append stdout and stderr, C-level output included, to the file at `path`.

    Where that cannot be opened, they stay where they are, and say why.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    except OSError as error:
        say(f"what follows belongs into another log: {error}")
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def say(what: str) -> None:
    """A line of this process's log, with the time as `logging` writes it."""
    now = datetime.now()
    print(f"{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d} {what}", file=sys.stderr, flush=True)


def enter_child(parent_pid: int, log_path: str | os.PathLike[str]) -> None:
    """Become a well-behaved child: call it first, from the main thread, before heavy imports."""
    die_with_parent(parent_pid)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    forgive_output()
    redirect_output(log_path)
    _lock_progress_bars_by_threads()


def _lock_progress_bars_by_threads() -> None:
    """tqdm would make a semaphore, for bars that processes share: who is killed leaves it, and the server complains."""
    import tqdm  # the server imports this file, and needs none

    tqdm.tqdm.set_lock(threading.RLock())

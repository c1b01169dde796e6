"""A process that is killed at one of the steps in which it changes the file of the response cache.

    python killed_cache.py

reads a JSON line a task, {"work": NAME of `WORKS`, "path": PATH, "step": N}, and answers with how many steps it took:
a child of it does the work, and is killed by SIGKILL before its N-th statement. With N = 0 it is not killed.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_pool import cache_upkeep
from gpu_pool.cache import CachedModel, ResponseCache

ANSWERS = 12
"""Of a batch that is stored."""
KEPT_MODEL, DELETED_MODEL = CachedModel("a" * 64, "kept"), CachedModel("b" * 64, "deleted")


def keys_of(model: CachedModel) -> list[bytes]:
    return [f"{model.name} {number}".encode() for number in range(ANSWERS)]


def store(path: Path, models: tuple[CachedModel, ...] = (KEPT_MODEL, DELETED_MODEL)) -> None:
    """Answers of both models, into a file that may be new."""
    cache = ResponseCache(path)
    for model in models:
        cache.store({key: (-1.0, True) for key in keys_of(model)}, model)
    cache.close()


def prune(path: Path) -> None:
    """Those of one model go."""
    cache_upkeep.prune(path, 1 << 30, None, [DELETED_MODEL.fingerprint])


def look(path: Path) -> None:
    """An older file is brought up to date."""
    cache_upkeep.cache_use(path, 1 << 30)


WORKS: dict[str, Callable[[Path], None]] = {"store": store, "prune": prune, "look": look}


class Steps(sqlite3.Connection):
    """Counts statements, and dies before the one at which it is to."""

    taken = 0
    last = 0

    def _step(self) -> None:
        Steps.taken += 1
        if Steps.taken == Steps.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def execute(self, *args: Any) -> sqlite3.Cursor:
        self._step()
        return super().execute(*args)

    def executemany(self, *args: Any) -> sqlite3.Cursor:
        self._step()
        return super().executemany(*args)

    def executescript(self, *args: Any) -> sqlite3.Cursor:
        self._step()
        return super().executescript(*args)


def main() -> None:
    cache_upkeep.PIECE, cache_upkeep.PAUSE_S = 5, 0.0  # many steps, quickly
    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **kwargs: connect(*args, factory=Steps, **kwargs)
    for line in sys.stdin:
        task = json.loads(line)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            Steps.taken, Steps.last = 0, task["step"]
            WORKS[task["work"]](Path(task["path"]))
            os.write(writer, str(Steps.taken).encode())
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(reader) as pipe:
            taken = pipe.read()
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps({"killed": killed, "steps": int(taken or 0)}), flush=True)


if __name__ == "__main__":
    main()

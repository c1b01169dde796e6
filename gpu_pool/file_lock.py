"""One process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait until no other process or thread is in here with the same `path`; the lock is the file `<stem>.lock`.

    The lock goes with the process, however that ends. The folder must exist; the lock file stays.
    """
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

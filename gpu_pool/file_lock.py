"""One process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from gpu_pool.errors import DataDirInUse


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait until no other process or thread is in here with the same `path`; the lock is the file `<stem>.lock`.

    The lock goes with the process, however that ends. The folder must exist; the lock file stays.
    """
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_folder(folder: Path) -> int:
    """Hold a data folder for this process, by the descriptor that is returned; raises DataDirInUse without waiting.

    The lock goes with the process.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DataDirInUse(f"another server uses the data folder {folder}") from None
    return descriptor

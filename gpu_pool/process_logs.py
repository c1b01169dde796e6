"""Logs of evaluators and workers, a file each: the oldest of those that have ended go, and none grows for ever."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

PASS_SECONDS = 600.0
"""Between two looks at them."""
MOST_FILES = 1000
MOST_BYTES = 256 << 20
"""Of the logs of processes that have ended, together."""
LONGEST_BYTES = 64 << 20
"""From here on the log of a process that lives is begun anew, and what it was so far takes the place of the part before
it."""

_log = logging.getLogger(__name__)


async def keep_bounded(folder: Path, living: Callable[[], Collection[str]]) -> None:
    """Look at the logs in the folder, for ever; `living` has the ids of the processes that write there now."""
    while True:
        try:
            await asyncio.to_thread(tidy, folder, living())
        except OSError as error:
            _log.warning("the logs in %s are as long as they are: %s", folder, error)
        await asyncio.sleep(PASS_SECONDS)


def tidy(folder: Path, living: Collection[str]) -> None:
    """Delete what is too much, and shorten what is too long. Raises OSError."""
    if not folder.is_dir():
        return
    in_use = {folder / f"{process_id}.log" for process_id in living}
    for path in in_use:
        if path.exists() and path.stat().st_size > LONGEST_BYTES:
            _begin_anew(path)
    ended = {
        path: path.stat() for pattern in ("*.log", "*.log.1") for path in folder.glob(pattern) if path not in in_use
    }
    kept_bytes = 0
    for number, (path, status) in enumerate(sorted(ended.items(), key=lambda log: -log[1].st_mtime_ns), 1):
        kept_bytes += status.st_size
        if number > MOST_FILES or kept_bytes > MOST_BYTES:
            path.unlink()


def _begin_anew(path: Path) -> None:
    """Its process appends to the file whatever becomes of it; what it writes between the copy and the cut is lost."""
    part = path.with_suffix(".log.part")
    try:
        shutil.copyfile(path, part)
        part.replace(path.with_suffix(".log.1"))
    except OSError:
        part.unlink(missing_ok=True)
        raise
    os.truncate(path, 0)

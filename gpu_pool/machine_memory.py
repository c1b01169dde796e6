"""How much memory this machine, or the container that we run in, has in all, and whether it ran out."""

from __future__ import annotations

import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container: cgroup v2's and v1's."""
_OOM_COUNTS = (
    Path("/proc/vmstat"),
    Path("/sys/fs/cgroup/memory.events"),
    Path("/sys/fs/cgroup/memory/memory.oom_control"),
)
"""Of the machine, and of a container: lines of a name and a number, one of which is `oom_kill`."""


def machine_bytes(limits: tuple[Path, ...] = _LIMITS) -> int:
    """Bytes of physical memory, or fewer where a container may not use all of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, *(limit for path in limits if (limit := _read(path)) is not None), physical)


def oom_kills(counts: tuple[Path, ...] = _OOM_COUNTS) -> int:
    """How many processes the kernel has killed so far because memory ran out, as far as it says: it never falls."""
    return sum(_oom_kills(path) for path in counts)


def _oom_kills(path: Path) -> int:
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if line[0] == "oom_kill"), 0)


def _read(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", or no file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

"""How much memory this machine, or the container that we run in, has in all and to spare, and whether it ran out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

_MEMINFO = Path("/proc/meminfo")
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container: cgroup v2's and v1's."""


class ContainerUse(NamedTuple):
    """The files that say what a container has used of its limit."""

    limit: Path
    usage: Path
    """In all, cached files included."""
    parts: Path
    """Lines of a name and bytes."""


_USES = (
    ContainerUse(_LIMITS[0], Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")),
    ContainerUse(
        _LIMITS[1],
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)
_CACHED = (("active_file", "inactive_file"), ("total_active_file", "total_inactive_file"))
"""Parts of a container's use that the kernel gives back when memory is wanted: cgroup v2's names, and v1's."""
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


def available_bytes(meminfo: Path = _MEMINFO, uses: tuple[ContainerUse, ...] = _USES) -> int:
    """Bytes that could be taken now without swapping, and within a container's limit.

    What the kernel only caches counts as available: after a large checkpoint has been read, files fill most of what is
    not used otherwise.
    """
    machine = _numbers(meminfo).get("MemAvailable:", 0) * 1024
    return max(0, min([machine, *(left for use in uses if (left := _left(use)) is not None)]))


def _left(use: ContainerUse) -> int | None:
    """What a container may take beyond what it has; None where nothing bounds it."""
    limit, used = _read(use.limit), _read(use.usage)
    if limit is None or used is None:
        return None
    parts = _numbers(use.parts)
    return limit - used + max(sum(parts.get(name, 0) for name in names) for names in _CACHED)


def oom_kills(counts: tuple[Path, ...] = _OOM_COUNTS) -> int:
    """How many processes the kernel has killed so far because memory ran out, as far as it says: it never falls."""
    return sum(_oom_kills(path) for path in counts)


def _oom_kills(path: Path) -> int:
    return _numbers(path).get("oom_kill", 0)


def _numbers(path: Path) -> dict[str, int]:
    """What the lines of a file say, each of which begins with a name and a number; nothing where there is no file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(number) for name, number, *_ in lines if number.isdigit()}


def _read(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", or no file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

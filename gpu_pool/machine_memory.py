"""How much memory this machine, or the container that we run in, has in all."""

from __future__ import annotations

import os
from pathlib import Path

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Of a container: cgroup v2's and v1's."""


def machine_bytes(limits: tuple[Path, ...] = _LIMITS) -> int:
    """Bytes of physical memory, or fewer where a container may not use all of it."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(physical, *(limit for path in limits if (limit := _read(path)) is not None), physical)


def _read(path: Path) -> int | None:
    """The number in a file; None where there is none ("max", or no file)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None

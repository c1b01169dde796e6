"""The machine's memory, and a container's share of it."""

from __future__ import annotations

import os
from pathlib import Path

from gpu_pool.machine_memory import machine_bytes, oom_kills
from gpu_pool.settings import evaluators_that_fit


def test_a_container_may_have_less(tmp_path: Path) -> None:
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = tuple(tmp_path / name for name in ("v2", "v1"))
    assert machine_bytes(files) == physical
    files[0].write_text("max\n")
    assert machine_bytes(files) == physical
    files[1].write_text("1048576\n")
    assert machine_bytes(files) == 1048576
    files[0].write_text(str(2 * physical))
    files[1].unlink()
    assert machine_bytes(files) == physical


def test_kills_for_want_of_memory_are_added_up(tmp_path: Path) -> None:
    files = tuple(tmp_path / name for name in ("vmstat", "v2", "v1"))
    assert oom_kills(files) == 0
    files[0].write_text("nr_free_pages 77\noom_kill 3\nballoon_inflate 0\n")
    files[1].write_text("low 0\noom 9\noom_kill 2\n")
    assert oom_kills(files) == 5
    files[1].write_text("low 0\n")
    assert oom_kills(files) == 3
    assert oom_kills() >= 0


def test_evaluators_have_a_share_of_the_memory() -> None:
    assert [evaluators_that_fit(gib << 30) for gib in (2, 24, 1024)] == [0, 8, 341]

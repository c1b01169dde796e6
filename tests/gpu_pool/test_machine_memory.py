"""The machine's memory, and a container's share of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_pool.machine_memory import ContainerUse, available_bytes, machine_bytes, oom_kills
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


def test_cached_files_are_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 24683656 kB\nMemFree: 1000 kB\nMemAvailable: 9000 kB\nHugePages_Total: 0\n")
    assert available_bytes(meminfo, ()) == 9000 * 1024
    stated = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    assert 0 < available_bytes() <= int(stated["MemTotal"]) * 1024


@pytest.mark.parametrize("prefix", ["", "total_"])
def test_a_container_has_what_its_limit_leaves(prefix: str, tmp_path: Path) -> None:
    """Files that the kernel caches for it count in its use, and are given back."""
    meminfo, *files = (tmp_path / name for name in ("meminfo", "limit", "usage", "parts"))
    meminfo.write_text("MemAvailable: 9000 kB\n")
    use = (ContainerUse(*files),)
    assert available_bytes(meminfo, use) == 9000 * 1024
    for file, text in zip(files, ("max\n", "5000\n", f"anon 1500\n{prefix}active_file 500\n"), strict=True):
        file.write_text(text)
    assert available_bytes(meminfo, use) == 9000 * 1024
    files[0].write_text("6000\n")
    assert available_bytes(meminfo, use) == 1500
    files[2].write_text(f"{prefix}active_file 500\n{prefix}inactive_file 3000\n")
    assert available_bytes(meminfo, use) == 4500
    files[0].write_text("1000\n")
    assert available_bytes(meminfo, use) == 0


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

"""Taking and giving back slots, on GPUs that the fake NVML library scripts and with real processes as workers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from fake_nvml import FakeNvml, gpu_line
from two_gpus import GIB, PROCESSES, STRANGER, TWO, UUID, locked, make_leases, reasons, view, worker

from gpu_pool.errors import GpuNotFound, GpuNotQuarantined
from gpu_pool.gpu_locks import GpuLock, default_folder
from gpu_pool.leases import Leases

# -------------------------------------------------------------------- taking


async def test_cpu_slots_are_always_there_and_cost_nothing(leases: Leases) -> None:
    assert await reasons(leases) == {"cpu:0": None, UUID[0]: None, UUID[1]: None}
    assert await leases.take("worker-1", ["cpu:0"]) is None
    await leases.reclaim("worker-1")


async def test_a_gpu_that_is_taken_between_look_and_lease_is_refused_with_the_reason(
    leases: Leases, nvml: FakeNvml
) -> None:
    assert (await reasons(leases))[UUID[1]] is None
    nvml.write(*TWO, f"proc 1 {STRANGER} 5120")
    assert await leases.take("worker-1", [UUID[1]]) == f"GPU 1: Other processes use it: {STRANGER} (5.0 GiB)."
    assert await leases.take("worker-1", [UUID[0]]) is None


async def test_all_or_nothing(leases: Leases, nvml: FakeNvml) -> None:
    nvml.write(gpu_line(), gpu_line(used_mib=70 * 1024))
    assert "Only 10.0 of 80.0 GiB are free" in (await leases.take("worker-1", UUID) or "")
    assert not locked(0)
    nvml.write(*TWO)
    assert await leases.take("worker-1", UUID) is None
    assert [(await view(leases, n)).worker_ids for n in (0, 1)] == [("worker-1",)] * 2


async def test_another_server_s_lock_is_respected_and_seen(leases: Leases, nvml: FakeNvml) -> None:
    held = f"Another evalpool server on this machine (process {os.getpid()}) holds it."
    other = GpuLock(UUID[0])
    assert other.acquire()
    assert await leases.take("worker-1", [UUID[0]]) == f"GPU 0: {held}"
    assert await reasons(leases) == {"cpu:0": None, UUID[0]: held, UUID[1]: None}
    nvml.write(*TWO, f"proc 0 {STRANGER} 9000")  # its worker
    assert (await reasons(leases))[UUID[0]] == held
    nvml.write(*TWO)
    other.release()
    assert await leases.take("worker-1", [UUID[0]]) is None
    assert (await reasons(leases))[UUID[0]] is None
    assert not other.acquire()


async def test_servers_that_are_told_to_meet_elsewhere_do(nvml: FakeNvml, tmp_path: Path) -> None:
    one, other = (make_leases(gpu_lock_dir=tmp_path / "elsewhere") for _ in range(2))
    assert await one.take("worker-1", [UUID[0]]) is None
    assert not locked(0)
    held = f"Another evalpool server on this machine (process {os.getpid()}) holds it."
    assert (await reasons(other))[UUID[0]] == held
    assert await other.take("worker-1", [UUID[0]]) == f"GPU 0: {held}"


async def test_the_lock_of_a_gpu_that_is_held_does_not_grow_old(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    file = default_folder() / f"{UUID[0]}.lock"
    os.utime(file, (0, 0))
    await leases.look()
    assert file.stat().st_mtime > 0


async def test_a_gpu_has_one_worker_unless_the_operator_allows_more(leases: Leases) -> None:
    assert await leases.take("worker-1", [UUID[0]], 10 * GIB) is None
    assert await leases.take("worker-2", [UUID[0]], 10 * GIB) == "GPU 0: It is held by worker-1."


async def test_workers_share_a_gpu_by_memory_budget(nvml: FakeNvml) -> None:
    leases = make_leases(max_workers_per_gpu=3)
    await leases.look()
    assert leases.slots("cuda")[0].memory_bytes == 79 * GIB
    assert await leases.take("worker-1", [UUID[0]], 30 * GIB) is None
    with worker(leases, "worker-1") as pid:
        nvml.write(*TWO, f"proc 0 {pid} {20 * 1024}")
        assert "40.0 GiB are needed" not in (await leases.take("worker-2", [UUID[0]], 40 * GIB) or "")
        refused = await leases.take("worker-3", [UUID[0]], 10 * GIB)
        assert refused == "GPU 0: 10.0 GiB are needed; 9.0 of 80.0 GiB are neither used nor promised."
        assert await leases.take("worker-3", [UUID[0]], 8 * GIB) is None
        assert leases.slots("cuda")[0].memory_bytes == 79 * GIB
        assert "held by worker-1, worker-2, worker-3" in (await leases.take("worker-4", [UUID[0]], GIB) or "")
        assert (await view(leases)).worker_ids == ("worker-1", "worker-2", "worker-3")


# -------------------------------------------------------------------- giving back


async def test_a_gpu_comes_back_when_nvml_shows_its_memory_free(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    await leases.reclaim("worker-1")
    assert (await reasons(leases))[UUID[0]] is None
    assert await leases.take("worker-1", [UUID[0]]) is None


async def test_a_gpu_is_not_given_back_before_its_memory_is_free(nvml: FakeNvml) -> None:
    leases = make_leases(gpu_return_timeout_s=60.0)
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases) as pid:
        nvml.write(*TWO, f"proc 0 {pid} 40960")
        await leases.look()
    reclaiming = asyncio.create_task(leases.reclaim("worker-1"))
    for used, *more in (
        (1024, f"proc 0 {pid} 40960"),
        (1024, f"proc 0 {pid} 0"),
        (40960, ""),
        (40960, f"error {PROCESSES} 4"),
    ):
        nvml.write(gpu_line(used_mib=used), TWO[1], *more)
        for _ in range(5):
            shown = await view(leases)
            assert (shown.worker_id, shown.free, shown.quarantined) == ("worker-1", False, False)
        assert not reclaiming.done()
        assert locked(0)
    assert shown.reason == "worker-1 has ended; its memory is not back yet."
    nvml.write(*TWO)
    await reclaiming
    assert (await view(leases)).free


async def test_a_gpu_that_cannot_be_read_confirms_nothing(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, "error nvmlDeviceGetMemoryInfo 10 0")
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert shown.quarantined
    assert "its memory could not be read (NVML cannot read it: " in (shown.reason or "")


@pytest.mark.parametrize("leak", [("proc 0 {pid} 0",), ("proc 0 {pid} -1",), ("proc 0 {pid} 20480",)])
async def test_a_gpu_on_which_a_dead_worker_s_process_stays_is_quarantined(
    leases: Leases, nvml: FakeNvml, leak: tuple[str, ...]
) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases) as pid:
        nvml.write(*TWO, f"proc 0 {pid} 9000")
        await leases.look()
    nvml.write(*TWO, *(line.format(pid=pid) for line in leak))
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert (shown.quarantined, shown.free, shown.worker_ids) == (True, False, ())
    assert f"0.2 s after a worker ended, processes of worker-1 are still on it: {pid}" in (shown.reason or "")


async def test_a_quarantine_stays_until_it_is_released(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(gpu_line(used_mib=4096), TWO[1])  # still more than nine tenths free, but less than before
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert "3.0 GiB more are in use than before worker-1, by no process that is listed" in (shown.reason or "")
    nvml.write(*TWO)
    refused = await leases.take("worker-2", [UUID[0]])
    assert "quarantined" in (refused or "")
    assert not locked(0)  # other servers judge for themselves
    with pytest.raises(GpuNotQuarantined, match=r"GPU 1 .* is not quarantined"):
        await leases.release_gpu(UUID[1])
    with pytest.raises(GpuNotFound, match=f"There is no GPU GPU-9; there are {UUID[0]}, {UUID[1]}"):
        await leases.release_gpu("GPU-9")
    released = await leases.release_gpu(UUID[0])
    assert (released.quarantined, released.free, released.reason) == (False, True, None)
    assert await leases.take("worker-2", [UUID[0]]) is None


async def test_a_gpu_released_too_soon_is_still_not_free(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(gpu_line(used_mib=40960), TWO[1])
    await leases.reclaim("worker-1")
    released = await leases.release_gpu(UUID[0])
    assert (released.free, released.reason) == (False, "Only 40.0 of 80.0 GiB are free; 90% must be.")


async def test_a_stranger_that_came_meanwhile_makes_no_quarantine(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, f"proc 0 {STRANGER} 40960")
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert (shown.quarantined, shown.reason) == (False, f"Other processes use it: {STRANGER} (40.0 GiB).")


async def test_one_of_two_workers_gives_its_share_back(nvml: FakeNvml) -> None:
    leases = make_leases(max_workers_per_gpu=2)
    assert await leases.take("worker-1", [UUID[0]], 30 * GIB) is None
    assert await leases.take("worker-2", [UUID[0]], 30 * GIB) is None
    with worker(leases, "worker-2") as neighbour:
        with worker(leases, "worker-1") as pid:
            nvml.write(*TWO, f"proc 0 {pid} {20 * 1024}", f"proc 0 {neighbour} {10 * 1024}")
            await leases.look()
        nvml.write(*TWO, f"proc 0 {neighbour} {29 * 1024}")  # it has grown
        await leases.reclaim("worker-1")
        shown = await view(leases)
        assert (shown.worker_ids, shown.quarantined, shown.reason) == (("worker-2",), False, None)
        assert locked(0)
        assert await leases.take("worker-3", [UUID[0]], 40 * GIB) is None
    nvml.write(*TWO)
    await leases.reclaim("worker-2")
    await leases.reclaim("worker-3")
    assert not locked(0)

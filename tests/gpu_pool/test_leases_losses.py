"""GPUs that are lost, divided or worn, and a driver that goes, hangs and comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FakeNvml, gpu_line, mig_uuid
from two_gpus import TWO, UUID, make_leases, reasons, view

from gpu_pool.leases import Leases


@pytest.mark.parametrize("code", [15, 16, 28, 999])
async def test_a_lost_gpu_is_told_of_and_comes_back(leases: Leases, nvml: FakeNvml, code: int) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, f"error * {code} 0")
    seen = await reasons(leases)
    assert f"NVML error {code}" in (seen[UUID[0]] or "")
    assert seen[UUID[1]] is None
    assert leases.lost() == {UUID[0]}
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert (shown.gpu.lost, shown.free, shown.quarantined, shown.worker_ids) == (True, False, False, ())
    assert await leases.take("worker-2", UUID)
    assert await leases.take("worker-2", [UUID[1]]) is None
    nvml.write(*TWO)  # it was reset
    assert (await reasons(leases))[UUID[0]] is None
    assert leases.lost() == frozenset()
    assert await leases.take("worker-3", [UUID[0]]) is None


async def test_a_gpu_that_cannot_be_read_for_a_moment_is_not_lost(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, "error nvmlDeviceGetMemoryInfo 10 0")
    assert "NVML error 10" in ((await reasons(leases))[UUID[0]] or "")
    assert leases.lost() == frozenset()


async def test_a_gpu_that_has_left_the_bus_is_lost(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[1]]) is None
    nvml.write(TWO[0])
    assert UUID[1] not in await reasons(leases)
    assert leases.lost() == {UUID[1]}
    await leases.reclaim("worker-1")
    assert leases.lost() == frozenset()
    assert await leases.take("worker-2", [UUID[1]]) == f"GPU {UUID[1]}: It is not there any more."


async def test_memory_errors_make_a_gpu_unfit_until_it_is_released(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, "ecc 0 2")
    assert "ECC could not correct 2 memory errors" in ((await reasons(leases))[UUID[0]] or "")
    assert leases.lost() == {UUID[0]}
    await leases.reclaim("worker-1")
    assert not (await view(leases)).quarantined
    assert (await leases.release_gpu(UUID[0])).free
    assert await leases.take("worker-2", [UUID[0]]) is None
    nvml.write(*TWO, "ecc 0 3")
    await leases.look()
    assert leases.lost() == {UUID[0]}
    await leases.release_gpu(UUID[0])
    nvml.write(*TWO)  # it was reset, and counts from the beginning again
    assert await reasons(leases) == {"cpu:0": None, UUID[0]: None, UUID[1]: None}
    nvml.write(*TWO, "ecc 0 1")
    assert "ECC could not correct 1 memory errors" in ((await reasons(leases))[UUID[0]] or "")


async def test_a_driver_that_goes_and_comes_back(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, "error * 9")
    seen = await reasons(leases)
    assert list(seen) == ["cpu:0", *UUID]
    assert "Driver Not Loaded" in (seen[UUID[1]] or "")
    assert leases.lost() == frozenset()  # what computes may go on: only NVML is silent
    assert "Driver Not Loaded" in (leases.problem() or "")
    assert leases.has_gpus
    nvml.write(*TWO)
    assert await reasons(leases) == {"cpu:0": None, UUID[0]: None, UUID[1]: None}
    assert leases.problem() is None


async def test_a_server_that_starts_while_the_driver_is_away_knows_the_gpus(nvml: FakeNvml, tmp_path: Path) -> None:
    await make_leases(data_dir=tmp_path).look()
    nvml.write("error * 9")
    later = make_leases(data_dir=tmp_path)
    assert [(slot.id, slot.memory_bytes >> 30) for slot in later.slots("cuda")] == [(uuid, 72) for uuid in UUID]
    assert later.has_gpus
    assert "Driver Not Loaded" in ((await reasons(later))[UUID[1]] or "")
    assert (later.lost(), later.problem()) == (frozenset(), (await view(later)).reason)
    nvml.write(TWO[0])
    assert await reasons(later) == {"cpu:0": None, UUID[0]: None}
    nvml.write("error * 9")
    assert [slot.id for slot in make_leases(data_dir=tmp_path).slots("cuda")] == [UUID[0]]
    (tmp_path / "gpus.json").write_text("[{}]")
    assert not make_leases(data_dir=tmp_path).has_gpus


async def test_a_machine_without_nvml_has_no_gpus_whatever_it_had(
    nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_leases(data_dir=tmp_path).look()
    nvml.write(f"error nvmlInitWithFlags {pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}")
    assert not make_leases(data_dir=tmp_path).has_gpus


async def test_nothing_is_given_back_while_nvml_is_silent(nvml: FakeNvml) -> None:
    leases = make_leases(gpu_return_timeout_s=0.001)
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(*TWO, "error * 9")
    reclaiming = asyncio.create_task(leases.reclaim("worker-1"))
    for _ in range(20):
        assert (await view(leases)).worker_id == "worker-1"
    assert not reclaiming.done()
    nvml.write(*TWO)
    await reclaiming
    assert (await view(leases)).free


async def test_a_driver_that_hangs_stops_nobody(
    leases: Leases, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    monkeypatch.setattr("gpu_pool.gpu_watch.LOOK_SECONDS", 0.05)
    nvml.write(*TWO, "hang nvmlDeviceGetMemoryInfo 1")
    assert "NVML has not answered" in ((await reasons(leases))[UUID[1]] or "")
    assert "NVML has not answered" in (await leases.take("worker-2", [UUID[1]]) or "")
    assert leases.lost() == frozenset()
    nvml.write(*TWO)
    monkeypatch.setattr("gpu_pool.gpu_watch.LOOK_SECONDS", 10.0)
    while (await reasons(leases))[UUID[1]] is not None:  # until the call that hung has returned
        await asyncio.sleep(0)
    assert await leases.take("worker-2", [UUID[1]]) is None


async def test_a_box_without_room_for_threads_confirms_nothing(
    leases: Leases, nvml: FakeNvml, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("no_more_threads")
    assert await leases.take("worker-1", [UUID[0]]) == "GPU 0: NVML could not be asked: can't start new thread."
    assert leases.lost() == frozenset()


async def test_a_gpu_that_is_divided_gives_way_to_its_instances(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(gpu_line(mig=True), TWO[1])  # no instance yet
    await leases.look()
    assert leases.lost() == {UUID[0]}
    nvml.write(gpu_line(mig=True), TWO[1], "mig 0 0 20480 0", "mig 0 1 40960 0")
    assert await reasons(leases) == {"cpu:0": None, mig_uuid(0, 0): None, mig_uuid(0, 1): None, UUID[1]: None}
    await leases.reclaim("worker-1")
    assert leases.lost() == frozenset()
    assert await leases.take("worker-2", [mig_uuid(0, 1)]) is None
    nvml.write(gpu_line(mig=True), TWO[1], "mig 0 0 20480 0", "error nvmlDeviceGetMemoryInfo 10 0")
    await leases.look()
    assert leases.lost() == frozenset()  # the GPU cannot be read now, which says nothing of its instances
    nvml.write(gpu_line(mig=True), TWO[1], "mig 0 0 20480 0")
    await leases.look()
    assert leases.lost() == {mig_uuid(0, 1)}


async def test_the_only_gpu_being_divided_keeps_its_jobs_waiting_with_the_reason(nvml: FakeNvml) -> None:
    leases = make_leases()
    nvml.write(gpu_line())
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(gpu_line(mig=True))
    assert (await reasons(leases))[UUID[0]] == "No GPU can be used: the driver shows none."
    assert leases.lost() == {UUID[0]}
    assert leases.slots("cuda")

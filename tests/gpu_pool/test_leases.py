"""Taking and giving back slots, on GPUs that the fake NVML library scripts and with real processes as workers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pynvml
import pytest
from fake_nvml import FakeNvml, gpu_line, gpu_uuid, mig_uuid

from gpu_pool.errors import GpuNotFound, GpuNotQuarantined
from gpu_pool.gpu_locks import GpuLock, default_folder
from gpu_pool.gpu_usage import UNLISTED
from gpu_pool.gpus import Inventory
from gpu_pool.leases import Leases
from gpu_pool.process_table import ProcessTable
from gpu_pool.records import GpuView
from gpu_pool.settings import PoolSettings

GIB = 1024**3
UUID = [gpu_uuid(n) for n in range(2)]
TWO = (gpu_line(used_mib=1024), gpu_line(used_mib=1024))
STRANGER = 2**22 + 77  # no process here can have this number
PROCESSES = "nvmlDeviceGetComputeRunningProcesses_v3"


@pytest.fixture
def nvml(fake_nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """Two GPUs of 80 GiB, of which the driver has one."""
    fake_nvml.install_here(monkeypatch)
    monkeypatch.setattr("gpu_pool.leases.RETURN_POLL_SECONDS", 0.01)
    fake_nvml.write(*TWO)
    return fake_nvml


def make_leases(*, in_container: bool = False, **settings: object) -> Leases:
    folder = Path(tempfile.gettempdir())  # of the test's own, see FakeNvml.install_here
    values = PoolSettings(**{"data_dir": folder, "cpu_workers": 1, "gpu_return_timeout_s": 0.2} | settings)
    return Leases(values, Inventory.open({}), ProcessTable(in_container=in_container))


@pytest.fixture
def leases(nvml: FakeNvml) -> Leases:
    return make_leases()


async def reasons(leases: Leases) -> dict[str, str | None]:
    return {slot.id: reason for slot, reason in await leases.look()}


async def view(leases: Leases, gpu: int = 0) -> GpuView:
    return (await leases.views())[gpu]


@contextmanager
def worker(leases: Leases, worker_id: str = "worker-1") -> Iterator[int]:
    """A process in a session of its own, of which the leases know as that worker's; its pid."""
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, start_new_session=True) as process:
        leases.started(worker_id, process.pid)
        yield process.pid
        process.kill()


def locked(gpu: int) -> bool:
    """Whether another server would find the GPU's lock held."""
    lock = GpuLock(UUID[gpu])
    taken = lock.acquire()
    lock.release()
    return not taken


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


# -------------------------------------------------------------------- strangers


async def test_a_worker_s_own_processes_are_no_strangers(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", UUID) is None
    with ExitStack() as stack:
        pid = stack.enter_context(worker(leases))
        nvml.write(*TWO, f"proc 0 {pid} 9000", f"proc 1 {pid} 9000")
        shown = await view(leases)
        assert (shown.worker_id, shown.free, shown.reason, shown.strangers) == ("worker-1", False, None, ())
        assert leases.contested() == frozenset()
        assert leases.news() == []


async def test_a_rank_of_a_worker_is_no_stranger(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", UUID) is None
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import sys; sys.stdin.read()'], "
        "stdin=subprocess.PIPE); print(p.pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        rank = int(process.stdout.readline())
        leases.started("worker-1", process.pid)
        nvml.write(*TWO, f"proc 0 {process.pid} 9000", f"proc 1 {rank} 9000")
        assert [shown.strangers for shown in await leases.views()] == [(), ()]


async def test_a_stranger_on_a_leased_gpu_is_told_of_once_and_ends_nothing(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases) as pid:
        nvml.write(*TWO, f"proc 0 {pid} 9000", f"proc 0 {STRANGER} 2048", f"proc 1 {STRANGER} 1024")
        shown = await view(leases)
        assert shown.strangers == ((STRANGER, 2 * GIB),)
        assert shown.reason == f"Other processes use it: {STRANGER} (2.0 GiB)."
        assert shown.worker_id == "worker-1"
        assert leases.contested() == {UUID[0]}
        [(sentence, workers)] = leases.news()
        assert sentence == f"GPU 0 ({UUID[0]}) is also used by other processes: {STRANGER} (2.0 GiB)"
        assert workers == ("worker-1",)
        await leases.look()
        assert leases.news() == []
        assert leases.contested() == {UUID[0]}
        assert leases.lost() == frozenset()


async def test_a_process_that_exists_here_is_a_stranger_in_a_container_too(nvml: FakeNvml) -> None:
    leases = make_leases(in_container=True)
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases), subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        nvml.write(*TWO, f"proc 0 {other.pid} 9000")
        assert (await view(leases)).strangers == ((other.pid, 9000 << 20),)


async def test_a_container_that_shows_the_host_s_numbers(nvml: FakeNvml) -> None:
    leases = make_leases(in_container=True)
    host_pid, other_host_pid = STRANGER, STRANGER + 1
    nvml.write(*TWO, f"proc 1 {other_host_pid} 5000")
    assert f"{other_host_pid} (4.9 GiB)" in ((await reasons(leases))[UUID[1]] or "")  # not ours: we hold nothing there
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases):
        nvml.write(*TWO, f"proc 0 {host_pid} 9000")
        assert (await view(leases)).strangers == ()
        leases.loaded("worker-1", 8 * GIB)
        nvml.write(*TWO, f"proc 0 {host_pid} 9000", f"proc 0 {other_host_pid} 9000")
        assert (await view(leases)).strangers == ((other_host_pid, 9000 << 20),)
    nvml.write(*TWO, f"proc 0 {host_pid} 9000")
    await leases.reclaim("worker-1")
    assert f"processes of worker-1 are still on it: {host_pid}" in ((await view(leases)).reason or "")


async def test_outside_a_container_a_number_that_does_not_exist_is_a_stranger_s(leases: Leases, nvml: FakeNvml) -> None:
    assert await leases.take("worker-1", [UUID[0]]) is None
    with worker(leases):
        nvml.write(*TWO, f"proc 0 {STRANGER} 9000")
        assert (await view(leases)).strangers == ((STRANGER, 9000 << 20),)


async def test_a_container_that_hides_all_processes(nvml: FakeNvml) -> None:
    leases = make_leases(in_container=True)
    hidden = f"error {PROCESSES} 4"
    nvml.write(gpu_line(used_mib=1024), gpu_line(used_mib=30 * 1024), hidden)
    seen = await reasons(leases)
    assert seen[UUID[0]] is None
    assert "Only 50.0 of 80.0 GiB are free" in (seen[UUID[1]] or "")
    assert await leases.take("worker-1", [UUID[0]]) is None
    nvml.write(gpu_line(used_mib=40 * 1024), gpu_line(), hidden)
    assert (await view(leases)).reason is None
    nvml.write(*TWO, hidden)
    await leases.reclaim("worker-1")
    assert (await view(leases)).free


async def test_memory_that_grows_beside_a_worker_at_rest_is_a_stranger_s(nvml: FakeNvml) -> None:
    leases = make_leases(in_container=True)
    resting = {"worker-1"}
    leases.at_rest = lambda worker_id, since: worker_id in resting

    def write(used_gib: int) -> None:
        nvml.write(gpu_line(used_mib=used_gib * 1024), TWO[1], f"error {PROCESSES} 4")

    write(1)
    assert await leases.take("worker-1", [UUID[0]]) is None
    write(40)
    assert (await view(leases)).strangers == ()
    for used in (45, 30, 45):
        write(used)
        shown = await view(leases)
    assert shown.strangers == ((UNLISTED, 15 * GIB),)
    assert shown.reason == "Other processes use it: unlisted (15.0 GiB)."
    assert leases.contested() == {UUID[0]}
    [(sentence, _)] = leases.news()
    assert sentence == f"GPU 0 ({UUID[0]}) is also used by other processes: unlisted (15.0 GiB)"
    resting.clear()
    write(16)  # the worker ends, the stranger stays
    await leases.reclaim("worker-1")
    shown = await view(leases)
    assert (shown.quarantined, shown.reason) == (False, "Only 64.0 of 80.0 GiB are free; 90% must be.")


async def test_memory_that_grows_while_a_worker_computes_may_be_its_own(nvml: FakeNvml) -> None:
    leases = make_leases(in_container=True)
    resting: set[str] = set()
    leases.at_rest = lambda worker_id, since: worker_id in resting
    hidden = f"error {PROCESSES} 4"
    assert await leases.take("worker-1", [UUID[0]]) is None
    for used, busy in ((10, False), (40, True), (50, True), (60, False), (60, False)):
        nvml.write(gpu_line(used_mib=used * 1024), TWO[1], hidden)
        resting = set() if busy else {"worker-1"}
        assert (await view(leases)).strangers == ()
    nvml.write(gpu_line(used_mib=60 * 1024 + 400), TWO[1], hidden)
    assert (await view(leases)).strangers == ()  # too little to be sure


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


# -------------------------------------------------------------------- what breaks


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

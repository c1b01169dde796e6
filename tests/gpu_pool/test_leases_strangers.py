"""Which processes on our GPUs are our workers', and which are strangers': listed, hidden or under other numbers."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

from fake_nvml import FakeNvml, gpu_line
from two_gpus import GIB, PROCESSES, STRANGER, TWO, UUID, make_leases, reasons, view, worker

from gpu_pool.gpu_usage import UNLISTED
from gpu_pool.leases import Leases


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

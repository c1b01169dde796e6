"""Taking and giving back slots, against an inventory whose GPUs the test changes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from gpu_pool import leases as leases_module
from gpu_pool.gpu_locks import GpuLock
from gpu_pool.gpus import Inventory
from gpu_pool.leases import Leases
from gpu_pool.records import Gpu
from gpu_pool.settings import PoolSettings

GIB = 1024**3


class TwoGpus(Inventory):
    """Two 80 GiB GPUs whose state is a plain dict."""

    def __init__(self) -> None:
        super().__init__(visible_devices="")
        self.state = {
            f"GPU-{n}": Gpu(
                uuid=f"GPU-{n}",
                index=str(n),
                name="fake",
                total_bytes=80 * GIB,
                free_bytes=79 * GIB,
                visible_device=str(n),
            )
            for n in range(2)
        }

    def change(self, uuid: str, **fields: object) -> None:
        self.state[uuid] = msgspec.structs.replace(self.state[uuid], **fields)

    def gpus(self) -> tuple[Gpu, ...]:
        return tuple(self.state.values())


@pytest.fixture
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TwoGpus:
    monkeypatch.setattr("gpu_pool.gpu_locks.tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(leases_module, "RECLAIM_SECONDS", 0.2)
    monkeypatch.setattr(leases_module, "RECLAIM_POLL_SECONDS", 0.01)
    return TwoGpus()


@pytest.fixture
def leases(inventory: TwoGpus) -> Leases:
    return Leases(PoolSettings(cpu_workers=1), inventory)


async def reasons(leases: Leases) -> dict[str, str | None]:
    return {slot.id: reason for slot, reason in await leases.look(())}


async def test_cpu_slots_are_always_there_and_cost_nothing(leases: Leases) -> None:
    assert await reasons(leases) == {"cpu:0": None, "GPU-0": None, "GPU-1": None}
    assert await leases.take(["cpu:0"], ()) is None
    await leases.reclaim(["cpu:0"], ())


async def test_a_stranger_s_gpu_is_refused_with_the_reason(leases: Leases, inventory: TwoGpus) -> None:
    await leases.look(())
    inventory.change("GPU-1", processes=((77, 5 * GIB),))
    refused = await leases.take(["GPU-1"], ())
    assert refused is not None
    assert "77" in refused
    assert await leases.take(["GPU-0"], ()) is None


async def test_all_or_nothing(leases: Leases, inventory: TwoGpus) -> None:
    inventory.change("GPU-1", free_bytes=GIB)
    assert await leases.take(["GPU-0", "GPU-1"], ())
    other = GpuLock("GPU-0")
    assert other.acquire()
    other.release()


async def test_another_server_s_lock_is_respected(leases: Leases) -> None:
    other = GpuLock("GPU-0")
    assert other.acquire()
    assert await leases.take(["GPU-0"], ())
    other.release()
    assert await leases.take(["GPU-0"], ()) is None


async def test_a_gpu_comes_back_when_its_memory_is_free(leases: Leases, inventory: TwoGpus) -> None:
    await leases.take(["GPU-0"], ())
    await leases.reclaim(["GPU-0"], ())
    assert (await reasons(leases))["GPU-0"] is None
    assert await leases.take(["GPU-0"], ()) is None


async def test_a_gpu_whose_memory_stays_away_is_quarantined(leases: Leases, inventory: TwoGpus) -> None:
    await leases.take(["GPU-0"], ())
    inventory.change("GPU-0", free_bytes=GIB)
    await leases.reclaim(["GPU-0"], ())
    inventory.change("GPU-0", free_bytes=79 * GIB)
    assert "memory was not free" in ((await reasons(leases))["GPU-0"] or "")
    (view, _) = await leases.views({}, ())
    assert not view.free


async def test_views_name_the_worker_that_holds_a_gpu(leases: Leases, inventory: TwoGpus) -> None:
    inventory.change("GPU-0", processes=((88, 5 * GIB),))
    first, second = await leases.views({"GPU-0": "worker-1"}, (88,))
    assert (first.worker_id, first.free, first.reason) == ("worker-1", False, None)
    assert (second.worker_id, second.free, second.reason) == (None, True, None)

"""Slots: what the box offers workers now, taking a slot for one, and giving it back once its memory is free again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection

from gpu_pool.gpu_locks import GpuLock
from gpu_pool.gpus import Inventory, why_busy
from gpu_pool.records import Gpu, GpuView, Slot
from gpu_pool.settings import PoolSettings

RECLAIM_SECONDS = 30.0
"""How long the memory of a dead worker may take to come back before its GPU is quarantined."""
RECLAIM_POLL_SECONDS = 0.25

logger = logging.getLogger(__name__)


class Leases:
    """CPU slots by count, GPU slots by NVML. NVML is asked in a thread: a sick driver may take its time."""

    def __init__(self, settings: PoolSettings, inventory: Inventory) -> None:
        self._settings = settings
        self._inventory = inventory
        self._gpus: dict[str, Gpu] = {}
        self._seen_gpus = False
        self._locks: dict[str, GpuLock] = {}
        self._free_before: dict[str, int] = {}
        self._quarantined: dict[str, str] = {}
        self._looking = asyncio.Lock()
        self._cpu_slots = [Slot(id=f"cpu:{n}", device="cpu", index=str(n)) for n in range(settings.cpu_workers)]

    @property
    def has_gpus(self) -> bool:
        """Whether any look so far found a GPU (a driver may come back)."""
        return self._seen_gpus

    def slots(self, device: str) -> list[Slot]:
        """All slots of a kind of device, usable or not."""
        return self._cpu_slots if device == "cpu" else [_slot(gpu) for gpu in self._gpus.values()]

    def visible_device(self, slot_id: str) -> str:
        """What CUDA_VISIBLE_DEVICES must say for a GPU."""
        return self._gpus[slot_id].visible_device

    async def look(self, own_pids: Collection[int]) -> tuple[tuple[Slot, str | None], ...]:
        """Every slot that exists now, and why it cannot be used (None: it can)."""
        async with self._looking:
            gpus = await asyncio.to_thread(self._inventory.gpus)
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._seen_gpus |= bool(gpus)
        seen = [(_slot(gpu), self._why_not(gpu, own_pids)) for gpu in gpus]
        return (*((slot, None) for slot in self._cpu_slots), *seen)

    async def take(self, slot_ids: Collection[str], own_pids: Collection[int]) -> str | None:
        """Lease these slots, all or nothing, checking once more; returns why not, or None."""
        wanted = [slot_id for slot_id in slot_ids if not slot_id.startswith("cpu:")]
        if not wanted:
            return None
        await self.look(own_pids)
        for slot_id in wanted:
            gpu = self._gpus.get(slot_id)
            reason = self._why_not(gpu, own_pids) if gpu else "the GPU is not there any more"
            if reason is None:
                lock = GpuLock(slot_id)
                if lock.acquire():
                    self._locks[slot_id] = lock
                else:
                    reason = lock.problem
            if reason is not None:
                self.release(wanted)
                return f"GPU {gpu.index if gpu else slot_id}: {reason}"
        for slot_id in wanted:
            self._free_before[slot_id] = self._gpus[slot_id].free_bytes
        return None

    def release(self, slot_ids: Collection[str]) -> None:
        """Let others have these slots."""
        for slot_id in slot_ids:
            self._free_before.pop(slot_id, None)
            if lock := self._locks.pop(slot_id, None):
                lock.release()

    async def reclaim(self, slot_ids: Collection[str], own_pids: Collection[int]) -> None:
        """Wait until the memory that a dead worker held is free again; then release, or else quarantine."""
        held = [slot_id for slot_id in slot_ids if slot_id in self._free_before]
        try:
            async with asyncio.timeout(RECLAIM_SECONDS):
                while not await self._memory_is_back(held, own_pids):
                    await asyncio.sleep(RECLAIM_POLL_SECONDS)
        except TimeoutError:
            for slot_id in held:
                self._quarantined[slot_id] = f"its memory was not free {RECLAIM_SECONDS:g} s after a worker ended"
                logger.error("GPU %s is quarantined: %s", slot_id, self._quarantined[slot_id])
        self.release(held)

    async def _memory_is_back(self, slot_ids: Collection[str], own_pids: Collection[int]) -> bool:
        if not slot_ids:
            return True
        await self.look(own_pids)
        gpus = [self._gpus[slot_id] for slot_id in slot_ids if slot_id in self._gpus]
        return all(
            gpu.free_bytes >= self._settings.gpu_free_fraction * self._free_before[gpu.uuid]
            or self._why_not(gpu, own_pids) is None
            for gpu in gpus
        )

    async def views(self, holders: dict[str, str], own_pids: Collection[int]) -> list[GpuView]:
        """Every GPU, who of us holds it, and why it is not free; `holders` is slot -> worker."""
        await self.look(own_pids)
        views: list[GpuView] = []
        for gpu in self._gpus.values():
            worker_id = holders.get(gpu.uuid)
            reason = None if worker_id else self._why_not(gpu, own_pids)
            views.append(GpuView(gpu=gpu, worker_id=worker_id, free=not worker_id and reason is None, reason=reason))
        return views

    def _why_not(self, gpu: Gpu, own_pids: Collection[int]) -> str | None:
        quarantined = self._quarantined.get(gpu.uuid)
        return quarantined or why_busy(gpu, frozenset(own_pids), self._settings.gpu_free_fraction)


def _slot(gpu: Gpu) -> Slot:
    return Slot(id=gpu.uuid, device="cuda", index=gpu.index)

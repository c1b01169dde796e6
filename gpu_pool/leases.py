"""Slots: what the box offers workers now, taking them, and giving them back once their memory is free again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable

from gpu_pool.endpoints import slot_id
from gpu_pool.errors import GpuNotFound, GpuNotQuarantined
from gpu_pool.gpu_locks import GpuLock
from gpu_pool.gpu_usage import (
    UNLISTED,
    Lease,
    Processes,
    could_be,
    describe,
    room_bytes,
    unexplained_bytes,
    why_busy,
    why_no_room,
    why_not_back,
)
from gpu_pool.gpu_watch import GpuWatch
from gpu_pool.gpus import Inventory
from gpu_pool.hardware import Gpu, Slot
from gpu_pool.known_gpus import KnownGpus
from gpu_pool.process_table import ProcessTable
from gpu_pool.settings import PoolSettings
from gpu_pool.unlisted_use import UnlistedUse
from gpu_pool.views import GpuView

RETURN_POLL_SECONDS = 0.25

logger = logging.getLogger(__name__)


class Leases:
    """CPU slots by count, GPU slots by NVML. A GPU is held by one worker, or by several with memory budgets.

    The file lock of a GPU is held for as long as any worker of ours is on it.
    """

    def __init__(self, settings: PoolSettings, inventory: Inventory, processes: ProcessTable | None = None) -> None:
        self._settings = settings
        self._watch = GpuWatch(inventory, KnownGpus(settings.data_dir / "gpus.json"))
        self._processes = processes or ProcessTable()
        self._gpus = {gpu.uuid: gpu for gpu in self._watch.known}
        self._seen_gpus = bool(self._gpus)
        self._known = asyncio.Event()
        self._leases: dict[str, list[Lease]] = {}
        self._locks: dict[str, GpuLock] = {}
        self.at_rest: Callable[[str, float], bool] = lambda worker_id, since: False
        """Whether a worker has had nothing to do since that time (monotonic seconds); for its owner to tell."""
        self._strangers: dict[str, Processes] = {}
        self._unlisted = UnlistedUse()
        self._reported: set[tuple[str, int]] = set()
        self._quarantined: dict[str, str] = {}
        self._accepted_errors: dict[str, int] = {}
        """GPU -> uncorrectable memory errors that an operator has seen and released it with."""
        self._api_slots = [Slot(id=slot_id(name), device="api", index=name) for name in sorted(settings.endpoints)]
        self._cpu_slots = [Slot(id=f"cpu:{n}", device="cpu", index=str(n)) for n in range(settings.cpu_workers)]

    # ------------------------------------------------------------------ what there is

    @property
    def has_gpus(self) -> bool:
        """Whether any look so far found a GPU, if need be one of an earlier server (a driver may come back)."""
        return self._seen_gpus

    @property
    def gpus_unknown(self) -> bool:
        """Whether nobody can say yet which GPUs there are, because the driver has not answered since it was needed."""
        return self._watch.tells_nothing

    async def gpus_known(self) -> None:
        """Return once that is known, be it that there are none."""
        if self.gpus_unknown:
            await self._known.wait()

    def slots(self, device: str) -> list[Slot]:
        """All slots of a kind of device, usable or not."""
        return self._cpu_slots if device == "cpu" else [self._slot(gpu) for gpu in self._gpus.values()]

    def gpus(self) -> tuple[Gpu, ...]:
        """All GPUs, usable or not, as the last look showed them."""
        return tuple(self._gpus.values())

    def visible_device(self, slot_id: str) -> str:
        """What CUDA_VISIBLE_DEVICES must say for a GPU."""
        return self._gpus[slot_id].visible_device

    def problem(self) -> str | None:
        """Why no GPU can be used, or which entries of the allow- and deny-lists name none; None: nothing is wrong."""
        return self._watch.reason or "; ".join(self._watch.unknown) or None

    @property
    def driver_trouble(self) -> str | None:
        """Why nothing is known of the GPUs now that were there before; None while NVML answers, or none were."""
        return self._watch.reason if self._watch.known and not self._watch.answers else None

    async def look(self) -> tuple[tuple[Slot, str | None], ...]:
        """Every slot that exists now, and why it cannot be used (None: it can, as far as others are concerned)."""
        began = time.monotonic()
        gpus = await self._watch.look()
        self._gpus = {gpu.uuid: gpu for gpu in gpus}
        self._seen_gpus |= bool(gpus)
        if not self.gpus_unknown:
            self._known.set()
        for lock in self._locks.values():
            lock.keep()
        for gpu in gpus:
            self._tell_apart(gpu, began)
            if not gpu.problem and gpu.uuid in self._accepted_errors:  # a reset begins to count again
                accepted = min(self._accepted_errors[gpu.uuid], gpu.uncorrectable_errors)
                self._accepted_errors[gpu.uuid] = accepted
        seen = [(self._slot(gpu), self._why_not(gpu)) for gpu in gpus]
        return (*((slot, None) for slot in (*self._cpu_slots, *self._api_slots)), *seen)

    def lost(self) -> frozenset[str]:
        """By the last look, the slots that cannot compute any more: what runs there is lost."""
        lost = {gpu.uuid for gpu in self._gpus.values() if gpu.lost or self._new_errors(gpu)}
        if self._watch.answers:
            lost.update(self._leases.keys() - self._gpus.keys())
        return frozenset(lost)

    def contested(self) -> frozenset[str]:
        """By the last look, the slots of our workers on which there are processes that are not ours."""
        return frozenset(uuid for uuid, strangers in self._strangers.items() if strangers and uuid in self._leases)

    async def crowded(self, worker_id: str) -> str | None:
        """Which processes that are not ours are on the worker's GPUs now; None when there are none."""
        await self.look()
        found = {uuid: self._strangers.get(uuid, ()) for uuid, _ in self._of(worker_id)}
        return "; ".join(f"GPU {uuid}: {describe(strangers)}" for uuid, strangers in found.items() if strangers) or None

    def news(self) -> list[tuple[str, tuple[str, ...]]]:
        """Strangers who have appeared beside our workers, each told of once: a sentence, and the workers."""
        news: list[tuple[str, tuple[str, ...]]] = []
        for uuid in self.contested():
            fresh = tuple(stranger for stranger in self._strangers[uuid] if (uuid, stranger[0]) not in self._reported)
            self._reported.update((uuid, pid) for pid, _ in fresh)
            if fresh:
                where = f"GPU {self._gpus[uuid].index} ({uuid})"
                news.append((f"{where} is also used by other processes: {describe(fresh)}", self._workers(uuid)))
        return news

    async def views(self) -> list[GpuView]:
        """Every GPU, who of us holds it, what strangers do there, and why it is not free."""
        await self.look()
        return [self._view(gpu) for gpu in self._gpus.values()]

    def _view(self, gpu: Gpu) -> GpuView:
        leases = self._leases.get(gpu.uuid, [])
        reason = self._why_not(gpu) or next((_waiting(lease) for lease in leases if lease.ended), None)
        return GpuView(
            gpu=gpu,
            worker_id=leases[0].worker_id if leases else None,
            worker_ids=self._workers(gpu.uuid),
            free=not leases and reason is None,
            reason=reason,
            strangers=self._strangers.get(gpu.uuid, ()),
            quarantined=gpu.uuid in self._quarantined,
        )

    # ------------------------------------------------------------------ take, reclaim, release

    async def take(self, worker_id: str, slot_ids: Collection[str], memory_bytes: int = 0) -> str | None:
        """Lease these slots to a worker, all or nothing, looking once more; returns why not, or None.

        `memory_bytes`: most memory that it may use on each GPU; 0: all, and no other worker may come.
        """
        wanted = [slot for slot in slot_ids if not slot.startswith(("cpu:", "api:"))]
        if not wanted:
            return None
        await self.look()
        for slot in wanted:
            gpu = self._gpus.get(slot)
            if reason := self._take(gpu, worker_id, memory_bytes) if gpu else "It is not there any more.":
                self.release(worker_id)
                return f"GPU {gpu.index if gpu else slot}: {reason}"
        return None

    def _take(self, gpu: Gpu, worker_id: str, memory_bytes: int) -> str | None:
        leases = self._leases.get(gpu.uuid, [])
        if reason := self._why_not(gpu) or why_no_room(gpu, leases, memory_bytes):
            return reason
        if len(leases) >= self._settings.max_workers_per_gpu:
            return f"It is held by {', '.join(self._workers(gpu.uuid))}."
        lock = self._locks.get(gpu.uuid) or self._lock_of(gpu)
        if not lock.acquire():
            return lock.problem
        self._locks[gpu.uuid] = lock
        lease = Lease(worker_id=worker_id, memory_bytes=memory_bytes, unexplained_before=unexplained_bytes(gpu))
        self._leases.setdefault(gpu.uuid, []).append(lease)
        return None

    def started(self, worker_id: str, leader: int) -> None:
        """The worker has this process now: whatever is in its session is ours."""
        for _, lease in self._of(worker_id):
            lease.leader = leader

    def loaded(self, worker_id: str, memory_bytes: int) -> None:
        """The worker has loaded its model, which takes that much memory, on all its GPUs together."""
        held = self._of(worker_id)
        for _, lease in held:
            lease.loaded_bytes = memory_bytes // len(held)

    async def reclaim(self, worker_id: str) -> None:
        """Wait until NVML shows a dead worker's memory as free again; then release its GPUs, or else quarantine them.

        While NVML does not answer it confirms nothing, and this waits on. A GPU that is lost or gone has nothing to
        confirm: when it comes back it is as good as any that is found.
        """
        try:
            await self._confirm(worker_id)
        finally:  # what nobody could look at is looked at again before it is leased
            self.release(worker_id)

    async def _confirm(self, worker_id: str) -> None:
        """Return when the memory is back, or the GPUs where it is not are quarantined."""
        held = self._of(worker_id)
        for _, lease in held:
            lease.ended = True
        missing: dict[str, str] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.gpu_return_timeout_s
        while held and (missing := await self._not_back(held)):
            if not self._watch.answers:
                deadline = loop.time() + self._settings.gpu_return_timeout_s
            elif loop.time() >= deadline:
                break
            await asyncio.sleep(RETURN_POLL_SECONDS)
        for uuid, reason in missing.items():
            seconds = self._settings.gpu_return_timeout_s
            self._quarantined[uuid] = f"It is quarantined: {seconds:g} s after a worker ended, {reason}."
            logger.error("GPU %s: %s", uuid, self._quarantined[uuid])

    async def _not_back(self, held: Iterable[tuple[str, Lease]]) -> dict[str, str]:
        """GPUs whose memory is not back, and why."""
        await self.look()
        missing: dict[str, str] = {}
        for uuid, lease in held:
            gpu = self._gpus.get(uuid)
            if not self._watch.answers:
                missing[uuid] = "NVML does not answer"
            elif gpu and not gpu.lost:
                neighbours = [each for each in self._leases[uuid] if each is not lease]
                if reason := why_not_back(gpu, lease, neighbours, self._strangers[uuid]):
                    missing[uuid] = reason
        return missing

    def release(self, worker_id: str) -> None:
        """Let others have what the worker held."""
        for uuid, lease in self._of(worker_id):
            self._leases[uuid].remove(lease)
            if not self._leases[uuid]:
                del self._leases[uuid]
                self._locks.pop(uuid).release()
                self._unlisted.forget(uuid)
                self._reported = {key for key in self._reported if key[0] != uuid}

    async def release_gpu(self, uuid: str) -> GpuView:
        """End a quarantine: the GPU counts as free when NVML shows it free. Raises GpuNotFound, GpuNotQuarantined."""
        await self.look()
        gpu = self._gpus.get(uuid)
        errors = self._new_errors(gpu) if gpu else 0
        if gpu is None:
            raise GpuNotFound(uuid, list(self._gpus))
        if not errors and uuid not in self._quarantined:
            raise GpuNotQuarantined(f"GPU {gpu.index} ({uuid}) is not quarantined: there is nothing to release")
        self._quarantined.pop(uuid, None)
        self._accepted_errors[uuid] = gpu.uncorrectable_errors
        logger.warning("GPU %s is released from quarantine by request", uuid)
        return self._view(gpu)

    # ------------------------------------------------------------------ judging

    def _why_not(self, gpu: Gpu) -> str | None:
        """Why no worker may come, as far as it is not our own workers' doing."""
        strangers = self._strangers.get(gpu.uuid, ())
        if quarantined := self._quarantined.get(gpu.uuid):
            return quarantined
        if errors := self._new_errors(gpu):
            return f"ECC could not correct {errors} memory errors: reset it, or release it to use it nevertheless."
        if gpu.uuid in self._leases:
            return why_busy(gpu, strangers, 0.0)
        busy = why_busy(gpu, strangers, self._settings.gpu_free_fraction)
        return gpu.problem or self._why_locked(gpu) or busy  # another server's workers would be strangers here

    def _why_locked(self, gpu: Gpu) -> str | None:
        lock = self._lock_of(gpu)
        lock.look()
        return lock.problem

    def _lock_of(self, gpu: Gpu) -> GpuLock:
        return GpuLock(gpu.uuid, self._settings.gpu_lock_dir)

    def _new_errors(self, gpu: Gpu) -> int:
        return max(0, gpu.uncorrectable_errors - self._accepted_errors.get(gpu.uuid, 0))

    def _tell_apart(self, gpu: Gpu, began: float) -> None:
        """Note which processes on it are our workers', and which are strangers', by a look that began then."""
        leases = self._leases.get(gpu.uuid, [])
        strangers: list[tuple[int, int]] = []
        for pid, size in gpu.processes:
            if lease := self._owner(gpu, leases, pid, size):
                lease.pids.add(pid)
            elif not self._is_ours(pid):
                strangers.append((pid, size))
        if leases:
            at_rest = all(self.at_rest(lease.worker_id, began) for lease in leases)
            if unlisted := self._unlisted.note(gpu, at_rest=at_rest):
                strangers.append((UNLISTED, unlisted))
        self._strangers[gpu.uuid] = tuple(strangers)

    def _owner(self, gpu: Gpu, leases: list[Lease], pid: int, size: int) -> Lease | None:
        leaders = {lease.leader: lease for lease in leases if lease.leader is not None}
        if known := next((lease for lease in leases if pid in lease.pids), None):
            return known
        if (leader := self._processes.leader_of(pid, leaders.keys())) is not None:
            return leaders[leader]
        if self._processes.in_container and not self._processes.exists(pid):
            return next((lease for lease in leases if could_be(lease, size, gpu)), None)
        return None

    def _is_ours(self, pid: int) -> bool:
        """Whether it belongs to a worker of ours on another GPU: it has strayed, but is no stranger."""
        leaders = {lease.leader for leases in self._leases.values() for lease in leases if lease.leader is not None}
        return self._processes.leader_of(pid, leaders) is not None

    def _slot(self, gpu: Gpu) -> Slot:
        leases = self._leases.get(gpu.uuid, [])
        memory_bytes = room_bytes(gpu, leases, self._settings.gpu_free_fraction)
        return Slot(id=gpu.uuid, device="cuda", index=gpu.index, memory_bytes=memory_bytes, is_mig=gpu.is_mig)

    def _of(self, worker_id: str) -> list[tuple[str, Lease]]:
        return [(uuid, each) for uuid, leases in self._leases.items() for each in leases if each.worker_id == worker_id]

    def _workers(self, uuid: str) -> tuple[str, ...]:
        return tuple(lease.worker_id for lease in self._leases.get(uuid, ()))


def _waiting(lease: Lease) -> str:
    return f"{lease.worker_id} has ended; its memory is not back yet."

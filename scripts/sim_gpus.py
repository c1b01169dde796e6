"""The GPUs of the simulated box: which are lost, and which worker holds each."""

from __future__ import annotations

from typing import Any

from sim_clock import Meter

from gpu_pool.hardware import Slot


class Gpus:
    """As many as the `meter` counts."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._slots = [Slot(id=f"GPU-{n}", device="cuda", index=str(n)) for n in range(meter.usable)]
        self._holders: dict[str, str] = {}
        """Slot -> worker, from its start until the slot is given back."""
        self._lost: set[str] = set()

    def seen(self) -> dict[str, Any]:
        """What a look shows: the fields of SlotsSeen."""
        slots = tuple((slot, "the GPU is lost" if slot.id in self._lost else None) for slot in self._slots)
        return {"slots": slots, "lost": frozenset(self._lost)}

    def slot_id(self, number: int) -> str:
        """The slot of this GPU."""
        return self._slots[number].id

    def holder(self, number: int) -> str | None:
        """The worker on this GPU."""
        return self._holders.get(self._slots[number].id)

    def lose(self, number: int) -> bool:
        """The GPU cannot compute any more; False when it was lost already."""
        slot_id = self._slots[number].id
        if slot_id in self._lost:
            return False
        self._lost.add(slot_id)
        self._meter.usable -= 1
        return True

    def find(self, number: int) -> None:
        """It can again."""
        self._lost.discard(self._slots[number].id)
        self._meter.usable += 1

    def take(self, worker_id: str, slot_ids: tuple[str, ...]) -> bool:
        """Lease these to a worker; False when one is lost. Raises AssertionError when one is leased already."""
        assert self._holders.keys().isdisjoint(slot_ids), f"one of {slot_ids} is leased twice"
        if not self._lost.isdisjoint(slot_ids):
            return False
        self._holders.update(dict.fromkeys(slot_ids, worker_id))
        return True

    def give_back(self, slot_ids: tuple[str, ...]) -> None:
        """Nobody holds these any more."""
        for slot_id in slot_ids:
            del self._holders[slot_id]

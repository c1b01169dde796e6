"""The slots of the box: who holds them, whom they are kept for, and why nothing new may start on some. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from gpu_pool.events import Demand
from gpu_pool.hardware import Slot
from gpu_pool.order import Shape, shape_of


class SlotBook(dict[str, Slot]):
    """Slots by id, in the order of the box, and what is known of each.

    Three of the notes say that a worker cannot start there. They differ in what ends that: for `closed` and `unusable`
    the next look at the hardware, and what that finds `unusable` does not count while we hold the slot, as it may be
    our own doing (memory in use); for `overdue` that the memory is back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[str, list[str]] = {}
        """Slot -> the workers that hold it, live ones and those that are gone and their memory is not back yet."""
        self.promised: dict[str, str] = {}
        """Slot -> the job that it is kept for: its workers are for nobody else. Each pass of the placer begins anew."""
        self.closed: frozenset[str] = frozenset()
        """Slots where nothing new may start even if we hold them: lost, wanted by someone else, or not there."""
        self.unusable: dict[str, str] = {}
        """Slot -> why the last look at the hardware, or somebody who has come since, rules it out."""
        self.refused: dict[str, str] = {}
        """Slot -> why a worker was refused there since the last look: until the next one, none is put beside others."""
        self.overdue: frozenset[str] = frozenset()
        """Slots whose memory should be back by now, after a worker that is gone, and is not."""
        self._suited: dict[Shape, list[Slot]] = {}
        """What `suited` has found out since it last could have changed."""

    # ------------------------------------------------------------------ looking things up

    def usable(self, slot_id: str) -> bool:
        """Whether a worker may be started there, now or once those of ours that hold it are gone."""
        if slot_id in self.closed or slot_id not in self or slot_id in self.overdue:
            return False
        return slot_id not in self.unusable or bool(self.holders.get(slot_id))

    def suited(self, demand: Demand) -> list[Slot]:
        """The usable slots that would do for this job, free or not."""
        shape = shape_of(demand)
        if shape not in self._suited:
            self._suited[shape] = [slot for slot in self.values() if self.usable(slot.id) and demand.accepts(slot)]
        return self._suited[shape]

    def gpus_held(self) -> int:
        """GPUs on which workers of ours are, or whose memory is not back yet."""
        return sum(1 for slot_id, held in self.holders.items() if held and self[slot_id].device == "cuda")

    def what_is_lost(self, slot_id: str) -> str:
        """A slot that cannot compute any more, and why, for people."""
        reason = self.unusable.get(slot_id, "it is not there any more").rstrip(".")
        return f"GPU {self[slot_id].index}, which is lost: {reason}"

    # ------------------------------------------------------------------ writing things down

    def see(self, slots: tuple[tuple[Slot, str | None], ...], closed: frozenset[str]) -> None:
        """Take in a look at the hardware. Slots that are not there any more are kept while workers hold them."""
        there = {slot.id: slot for slot, _ in slots}
        missing = {slot_id: self[slot_id] for slot_id in sorted(self.holders) if self._is_missing(slot_id, there)}
        self.clear()
        self.update(there | missing)
        self.closed = closed | missing.keys()
        self.unusable = {slot.id: reason for slot, reason in slots if reason is not None}
        self.refused.clear()
        self._suited.clear()

    def _is_missing(self, slot_id: str, there: dict[str, Slot]) -> bool:
        return bool(self.holders[slot_id]) and slot_id not in there

    def refuse(self, slot_ids: Iterable[str], reason: str) -> None:
        """Somebody else has come to use these slots since the last look."""
        for reasons in (self.unusable, self.refused):
            reasons.update(dict.fromkeys(slot_ids, reason))
        self._suited.clear()

    def hold(self, slot_ids: Iterable[str], worker_id: str) -> None:
        """A worker has these slots now."""
        for slot_id in slot_ids:
            self.holders.setdefault(slot_id, []).append(worker_id)

    def let_go(self, slot_ids: Iterable[str], worker_id: str) -> None:
        """A worker has them no more, nor is anything of it in their memory."""
        for slot_id in slot_ids:
            self.holders[slot_id].remove(worker_id)
        self.expect_no_more(self.overdue.difference(slot_ids))

    def expect_no_more(self, slot_ids: frozenset[str]) -> None:
        """Nobody counts on the memory of these slots for now."""
        self.overdue = slot_ids
        self._suited.clear()

"""Looking at the GPUs from the loop: never waits long for a sick driver, and remembers what it hides for a time."""

from __future__ import annotations

import asyncio

import msgspec

from gpu_pool.daemon_thread import in_daemon_thread
from gpu_pool.gpus import Inventory
from gpu_pool.hardware import Gpu
from gpu_pool.known_gpus import KnownGpus

LOOK_SECONDS = 10.0
"""How long a look at the GPUs may take. NVML may hang for as long as a GPU does, and nothing can end such a call."""


class GpuWatch:
    """The inventory, asked in a thread of its own, one look at a time."""

    def __init__(self, inventory: Inventory, earlier: KnownGpus) -> None:
        """`earlier` has the GPUs of when a server last ran here: while NVML has not answered this one, they are known.

        It is told of those that are there now.
        """
        self._inventory = inventory
        self._earlier = earlier
        self.known = inventory.seen
        """The GPUs that were seen last."""
        if inventory.has_library and not inventory.answers:
            self.known = earlier.recall()
        self._turn = asyncio.Lock()
        self._looking: asyncio.Future[tuple[Gpu, ...]] | None = None
        """A look that has not ended, or that nobody waited for."""
        self.answers = False
        """Whether NVML answered at the last look: otherwise nothing is known of what happens on the GPUs."""
        self.reason: str | None = None
        """Why no GPU can be used, for people; None when some can."""
        self.unknown: list[str] = []
        """What is wrong with the allow- and deny-lists, a sentence an entry."""

    @property
    def tells_nothing(self) -> bool:
        """Whether no GPU is known, not even from earlier, although there may be some: NVML has never answered."""
        return not self.known and self._inventory.may_have_any

    async def look(self) -> tuple[Gpu, ...]:
        """All GPUs now. While NVML answers nothing, or shows no GPU at all, those last seen, with that as `problem`."""
        gpus = await self._ask()
        if isinstance(gpus, str):
            self.answers, self.reason, gpus = False, gpus, ()
        else:
            self.answers = bool(gpus) or self._inventory.answers
            self.reason, self.unknown = self._inventory.reason, self._inventory.unknown
        if gpus:
            self._earlier.keep(gpus)
            self.known = gpus
            return gpus
        return tuple(
            msgspec.structs.replace(gpu, problem=self.reason, lost=self.answers, processes=(), free_bytes=0)
            for gpu in self.known
        )

    async def _ask(self) -> tuple[Gpu, ...] | str:
        """A look that begins now, or why there is none: it does not end in time, nor has an earlier one even yet."""
        silence = f"NVML has not answered for {LOOK_SECONDS:g} s."
        async with self._turn:
            if self._looking is not None and not self._looking.done():
                return silence
            looking = self._looking = in_daemon_thread(self._inventory.gpus, "nvml")
            await asyncio.wait([looking], timeout=LOOK_SECONDS)
            try:
                return looking.result() if looking.done() else silence
            except OSError as error:  # no memory, no further thread: later there may be
                return f"NVML could not be asked: {error.strerror}."

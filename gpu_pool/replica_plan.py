"""On how many GPUs a replica goes: the fewest whose memory holds it. Pure: sizes in, a count or a refusal out.

Refused is what can never fit, by the memory that GPUs have in all; what others use at the moment makes a job wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from gpu_pool.errors import InvalidRequest
from gpu_pool.hardware import Gpu
from gpu_pool.model_size import ReplicaSize
from gpu_pool.records import Record

_GIB = 1024**3
_SMALLER = "a smaller dtype (bfloat16), load_in_4bit or a smaller model would fit"


class ReplicaPlan(Record, frozen=True, kw_only=True):
    """What each replica of a job gets; the least where nothing is known."""

    gpus: int = 1
    memory_bytes: int = 0
    """That it needs on each of them; 0 where it is not known, and on a CPU."""
    size: ReplicaSize | None = None

    def describe(self) -> str:
        """One line for the log."""
        if self.size is None:
            return "how much memory its model needs is not known"
        return f"its model needs {_need(self.size, self.gpus)} on each of {self.gpus} devices"


def plan_on_gpus(
    size: ReplicaSize | None,
    gpus: Collection[Gpu],
    *,
    cap: int,
    max_gpus: int | None = None,
    free_fraction: float,
    field: str,
) -> ReplicaPlan:
    """The fewest of `gpus` (all that the job may use) that hold a replica; one where sizes are not known.

    `cap` is the job's `num_gpus`, `max_gpus` the most that the operator lets us hold; `free_fraction` the share of a
    GPU's memory that a worker may count on.

    Raises:
        InvalidRequest: of `num_gpus` where more are needed than that, of `field` where all that may be used together
            do not suffice.
    """
    if size is None or not any(gpu.total_bytes for gpu in gpus):  # no GPU can be read now: it will be seen
        if max_gpus == 0:
            raise InvalidRequest(field, "the model needs a GPU, and no more than 0 may be held (setting max_gpus)")
        return ReplicaPlan()
    usable = usable_bytes(gpus, free_fraction)
    whole = [room for room, gpu in zip(usable, gpus, strict=True) if not gpu.is_mig]
    count = 1 if fewest_gpus(size, usable) == 1 else fewest_gpus(size, whole)
    if count is None:
        only_one = " (a model cannot be spread over MIG instances)" if len(whole) < len(usable) else ""
        problem = f"the model needs {_need(size, 1)}, and there is room on {_have(usable)}{only_one}; {_SMALLER}"
        raise InvalidRequest(field, problem)
    if max_gpus is not None and count > max_gpus:
        needed = f"on each of {count} GPUs the model needs {_need(size, count)}"
        raise InvalidRequest(field, f"{needed}, and no more than {max_gpus} may be held (setting max_gpus); {_SMALLER}")
    if count > cap:
        problem = (
            f"must be at least {count}, but is {cap}: on each of {count} GPUs the model needs {_need(size, count)}"
        )
        raise InvalidRequest("num_gpus", f"{problem}, and there is room on {_have(usable)}")
    return ReplicaPlan(gpus=count, memory_bytes=size.bytes_on_each(count), size=size)


def plan_to_wait(size: ReplicaSize, gpus: Collection[Gpu], *, cap: int, free_fraction: float) -> ReplicaPlan:
    """For a job that had room once: the fewest that would hold it if those that are missing were as large as the
    largest there; all that it may use where even they would not."""
    usable = usable_bytes([gpu for gpu in gpus if not gpu.is_mig], free_fraction)
    missing = [max(usable, default=0)] * max(0, cap - len(usable))
    count = min(cap, fewest_gpus(size, [*usable, *missing]) or cap)
    return ReplicaPlan(gpus=count, memory_bytes=size.bytes_on_each(count), size=size)


def plan_on_cpu(size: ReplicaSize | None, machine_bytes: int, *, field: str) -> ReplicaPlan:
    """A replica in the machine's memory.

    Raises:
        InvalidRequest: of `field` where the machine has less than it needs.
    """
    if size is None:
        return ReplicaPlan()
    if size.bytes_on_each(1) > machine_bytes:
        have = f"this machine has {machine_bytes / _GIB:.1f} GiB of memory"
        raise InvalidRequest(field, f"the model needs {_need(size, 1)}, and {have}; {_SMALLER}")
    return ReplicaPlan(size=size)


def fewest_gpus(size: ReplicaSize, usable: Collection[int]) -> int | None:
    """The least count of GPUs, of which each can give `usable` bytes, that hold a replica; None where all do not.

    Counts over which the model can be sharded go first: over others its layers are spread, and the GPUs take turns.
    """
    fitting = [
        count
        for count in range(1, len(usable) + 1)
        if sum(have >= size.bytes_on_each(count) for have in usable) >= count
    ]
    return next((count for count in fitting if count == 1 or size.divides_by(count)), next(iter(fitting), None))


def usable_bytes(gpus: Collection[Gpu], free_fraction: float) -> list[int]:
    """What a worker may count on of each GPU; of one that cannot be read now, what the largest of the others has."""
    largest = max((gpu.total_bytes for gpu in gpus), default=0)
    return [int((gpu.total_bytes or largest) * free_fraction) for gpu in gpus]


def _need(size: ReplicaSize, count: int) -> str:
    weights = size.bytes_on_each(count) - size.room_bytes
    about = "about " if size.estimated else ""
    total = (weights + size.room_bytes) / _GIB
    return f"{total:.1f} GiB ({about}{weights / _GIB:.1f} of weights and {size.room_bytes / _GIB:.1f} of working room)"


def _have(usable: Collection[int]) -> str:
    """Such as "2 GPUs of 72.0 GiB and 1 of 21.6 GiB"."""
    counts = Counter(sorted(usable, reverse=True))
    first, *others = [(count, f"of {size / _GIB:.1f} GiB") for size, count in counts.items()]
    noun = "GPU" if first[0] == 1 else "GPUs"
    return " and ".join([f"{first[0]} {noun} {first[1]}", *(f"{count} {words}" for count, words in others)])

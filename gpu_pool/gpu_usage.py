"""Judging a GPU by what NVML shows: whether it is free, has room, and whether a worker's memory is back. Pure.

Two accounts of memory are kept apart: what listed processes use, and the rest, which no process accounts for. The
memory of a worker is back when its processes are gone from the list and the rest is what it was before the worker came.
So the growth of a neighbour on a shared GPU, or a stranger who came meanwhile, is not taken for what the worker left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from gpu_pool.hardware import Gpu

GIB = 1024**3
RETURN_TOLERANCE_BYTES = 512 * 1024**2
"""Memory that the driver itself may hold more of after a worker than before (contexts, caches); no model is smaller."""

UNLISTED = 0
"""Stands for the pid of processes that NVML does not list, but whose memory shows."""
Processes = tuple[tuple[int, int], ...]
"""(pid, bytes used) each; 0 bytes where the driver does not tell."""


class Lease(msgspec.Struct, kw_only=True):
    """One worker's hold of one GPU."""

    worker_id: str
    memory_bytes: int
    """What the worker may use; 0: all that there is."""
    unexplained_before: int
    """Bytes in use on the GPU, of no listed process, when the worker came."""
    leader: int | None = None
    """The worker's process, which leads a session."""
    loaded_bytes: int = 0
    """What its model takes, by the worker's own account, once it is loaded."""
    pids: set[int] = msgspec.field(default_factory=set[int])
    """Its processes as NVML numbers them: all that were ever listed on the GPU."""
    ended: bool = False
    """Its process is dead, and its memory not yet seen to be back."""


def unexplained_bytes(gpu: Gpu) -> int:
    """Memory in use that no listed process accounts for."""
    return max(0, gpu.total_bytes - gpu.free_bytes - sum(size for _, size in gpu.processes))


def why_busy(gpu: Gpu, strangers: Processes, free_fraction: float) -> str | None:
    """Why a first worker may not have this GPU, as a sentence with numbers; None when it is free.

    `strangers` are the processes on it that are not ours; `free_fraction` is the share of its memory that must be free.
    """
    if gpu.problem:
        return gpu.problem
    if strangers:
        return f"Other processes use it: {describe(strangers)}."
    if gpu.free_bytes < free_fraction * gpu.total_bytes:
        return (
            f"Only {gpu.free_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB are free; {free_fraction:.0%} must be."
        )
    return None


def room_bytes(gpu: Gpu, leases: Sequence[Lease], free_fraction: float = 0.0) -> int:
    """Memory that our workers may have on it, together: what is or was free without them.

    On a GPU that others fill it is what there will be once it counts as free, the share `free_fraction` at least.
    """
    if not leases:
        return max(gpu.free_bytes, int(free_fraction * gpu.total_bytes))
    return max(0, gpu.total_bytes - min(lease.unexplained_before for lease in leases))


def why_no_room(gpu: Gpu, leases: Sequence[Lease], memory_bytes: int) -> str | None:
    """Why one more worker, that may use `memory_bytes` (0: all), does not fit beside these; None when it does.

    A budget counts whole, used or not.
    """
    if greedy := next((lease for lease in leases if not lease.memory_bytes), None):
        return f"It is held by {greedy.worker_id}."
    if leases and not memory_bytes:
        return f"It is held by {leases[0].worker_id}, and the new worker has no memory budget."
    promised = sum(lease.memory_bytes for lease in leases)
    free = max(0, min(gpu.free_bytes, room_bytes(gpu, leases) - promised))
    if free < memory_bytes:
        return (
            f"{memory_bytes / GIB:.1f} GiB are needed; {free / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB are neither "
            "used nor promised."
        )
    return None


def why_not_back(gpu: Gpu, lease: Lease, neighbours: Iterable[Lease], strangers: Processes) -> str | None:
    """Why the memory of a worker that has ended does not count as returned; None when it does.

    Where the driver tells no memory by process, neighbours may have grown up to their budgets meanwhile, and strangers
    as they like: memory that is missing beside such a stranger is taken for the stranger's.
    """
    if gpu.problem:
        return f"its memory could not be read ({gpu.problem.rstrip('.')})"
    left = tuple((pid, size) for pid, size in gpu.processes if pid in lease.pids)
    if left:
        return f"processes of {lease.worker_id} are still on it: {describe(left)}"
    if any(not size for _, size in strangers):
        return None
    unlisted = sum(size for pid, size in strangers if pid == UNLISTED)
    grown = unexplained_bytes(gpu) - unlisted - lease.unexplained_before
    hidden = sum(each.memory_bytes for each in neighbours if not _measured_bytes(gpu, each))
    if grown > hidden + RETURN_TOLERANCE_BYTES:
        return f"{grown / GIB:.1f} GiB more are in use than before {lease.worker_id}, by no process that is listed"
    return None


def could_be(lease: Lease, size: int, gpu: Gpu) -> bool:
    """Whether a listed process that does not exist here may be the lease's, under its number on the host.

    One process at most (a worker has one on each of its GPUs), none where the worker is listed already, and none that
    uses less memory than the worker's model takes.
    """
    listed = any(pid in lease.pids for pid, _ in gpu.processes)
    return not lease.ended and not listed and (not size or size >= lease.loaded_bytes)


def describe(processes: Processes) -> str:
    """ "77 (5.0 GiB), unlisted (1.0 GiB)"."""
    return ", ".join(f"{pid if pid != UNLISTED else 'unlisted'} ({size / GIB:.1f} GiB)" for pid, size in processes)


def _measured_bytes(gpu: Gpu, lease: Lease) -> int:
    return sum(size for pid, size in gpu.processes if pid in lease.pids)

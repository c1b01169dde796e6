"""The GPUs of a box as NVML shows them, and the slots that they are for the scheduler: frozen values."""

from __future__ import annotations

from gpu_pool.records import Device, Record


class Gpu(Record, frozen=True, kw_only=True):
    """One schedulable GPU (a whole one or a MIG instance), as NVML showed it at the last look."""

    uuid: str
    index: str
    """Position in PCI order: "0"; of a MIG instance "0:1"."""
    name: str
    total_bytes: int
    free_bytes: int
    visible_device: str
    """What CUDA_VISIBLE_DEVICES must say for it: an integer index, or the MIG uuid."""
    processes: tuple[tuple[int, int], ...] = ()
    """(pid, bytes used) of compute processes on it; bytes are 0 where the driver hides them."""
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    problem: str | None = None
    """Why it cannot be used (lost, unreadable), or None."""
    lost: bool = False
    """It cannot compute any more: what runs on it is lost."""
    uncorrectable_errors: int = 0
    """Memory errors that ECC could not correct, since the driver was loaded."""

    @property
    def is_mig(self) -> bool:
        """Whether it is a MIG instance: CUDA shows a process no more than one of them."""
        return ":" in self.index


class Slot(Record, frozen=True, kw_only=True):
    """Room for one worker: a GPU, a share of the CPU, or an endpoint elsewhere."""

    id: str
    """A GPU's uuid, "cpu:0", or "api:NAME" of an endpoint."""
    device: Device
    index: str = ""
    """Of a GPU, its position in PCI order; what `device: "cuda:N"` names."""
    memory_bytes: int = 0
    """Memory that workers of ours may have there, together; 0: not known, and one worker has all of it."""
    is_mig: bool = False
    """A MIG instance: CUDA shows a process no more than one, so it cannot be one of several for a replica."""

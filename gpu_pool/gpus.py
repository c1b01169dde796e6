"""Which GPUs this machine has and who uses them, as NVML tells it. Looks only: it changes nothing on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pynvml as untyped_pynvml

from gpu_pool.records import Gpu, Record

_T = TypeVar("_T")
pynvml: Any = untyped_pynvml  # it makes its error classes as it is imported, where no type checker sees them
_GIB = 1024**3
_DRIVER_GONE = (
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
_NOT_TOLD = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
)
_PROCESS_LIST_TRIES = 5  # the list may grow between asking for its length and reading it


class _Found(Record, frozen=True, kw_only=True):
    """A GPU, and the physical GPU that it is or is a part of."""

    gpu: Gpu
    parent_uuid: str


class Inventory:
    """The GPUs that we may use. Calls may take seconds and must not overlap: make them in one thread off the loop."""

    def __init__(self, visible_devices: str | None) -> None:
        """`visible_devices` is an inherited CUDA_VISIBLE_DEVICES: the set we may use; None: every GPU."""
        self._visible_devices = visible_devices
        self._initialised = False
        self._uuids: dict[int, str] = {}
        self.reason: str | None = None
        """Why the last look found no GPU, for people; None when it found one."""

    @classmethod
    def open(cls, environment: Mapping[str, str] = os.environ) -> Inventory:
        """An inventory that has looked once. Never raises: without library, driver or permission it has no GPUs."""
        inventory = cls(environment.get("CUDA_VISIBLE_DEVICES"))
        inventory.gpus()
        return inventory

    def gpus(self) -> tuple[Gpu, ...]:
        """A fresh look: usable GPUs in PCI order, MIG instances in place of the GPU that they divide.

        A GPU that cannot be read is listed with its `problem`. A driver that went away is asked again at each look.
        """
        try:
            self._initialise()
            found = [each for index in range(pynvml.nvmlDeviceGetCount()) for each in self._read(index)]
        except pynvml.NVMLError as error:
            self.close()
            self.reason = f"No GPU can be used: {_explain(error)}."
            return ()
        usable = _visible(found, self._visible_devices)
        self.reason = None if usable else _why_none(len(found), self._visible_devices)
        return usable

    def close(self) -> None:
        """Let NVML go; the next look takes it up again."""
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
        self._uuids.clear()

    def _initialise(self) -> None:
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised = True

    def _read(self, index: int) -> Iterator[_Found]:
        """What is at this position, in NVML's order: that of PCI, which CUDA_DEVICE_ORDER=PCI_BUS_ID means too."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._uuids[index] = pynvml.nvmlDeviceGetUUID(handle)
            found = list(_read_mig(handle, index) if _mig_enabled(handle) else _read_whole(handle, index))
        except pynvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise
            # A lost GPU may not even tell its name: it keeps the identity it was known by.
            uuid = self._uuids.get(index, f"GPU-unknown-{index}")
            found = [_unreadable(index, uuid, _explain(error))]
        for gpu in found:
            yield _Found(gpu=gpu, parent_uuid=self._uuids.get(index, gpu.uuid))


def why_busy(gpu: Gpu, own_pids: frozenset[int], free_fraction: float) -> str | None:
    """Why a new worker may not have this GPU, as a sentence with numbers; None when it is free.

    `own_pids` are our processes; `free_fraction` is the share of its memory that must be free.
    """
    if gpu.problem:
        return gpu.problem
    foreign = [f"{pid} ({size / _GIB:.1f} GiB)" for pid, size in gpu.processes if pid not in own_pids]
    if foreign:
        return f"Other processes use it: {', '.join(foreign)}."
    if gpu.free_bytes < free_fraction * gpu.total_bytes:
        return (
            f"Only {gpu.free_bytes / _GIB:.1f} of {gpu.total_bytes / _GIB:.1f} GiB are free; "
            f"{free_fraction:.0%} must be."
        )
    return None


def _mig_enabled(handle: Any) -> bool:
    mode = _if_told(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _read_whole(handle: Any, index: int) -> Iterator[Gpu]:
    yield _read_device(handle, str(index), str(index), _temperature(handle))


def _read_mig(parent: Any, index: int) -> Iterator[Gpu]:
    for position in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, position)
        except pynvml.NVMLError_NotFound:
            continue
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        yield _read_device(handle, f"{index}:{position}", uuid, _temperature(parent))


def _read_device(handle: Any, index: str, visible_device: str, temperature: int | None) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return Gpu(
        uuid=pynvml.nvmlDeviceGetUUID(handle),
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        total_bytes=memory.total,
        free_bytes=memory.free,
        visible_device=visible_device,
        processes=_processes(handle),
        utilization_percent=_if_told(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        temperature_celsius=temperature,
    )


def _temperature(handle: Any) -> int | None:
    return _if_told(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))


def _processes(handle: Any) -> tuple[tuple[int, int], ...]:
    """(pid, bytes) of each compute process; none where containers or permissions hide them."""
    for _ in range(_PROCESS_LIST_TRIES - 1):
        with contextlib.suppress(pynvml.NVMLError_InsufficientSize):
            return _list_processes(handle)
    return _list_processes(handle)


def _list_processes(handle: Any) -> tuple[tuple[int, int], ...]:
    processes = _if_told(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
    return tuple((process.pid, process.usedGpuMemory or 0) for process in processes)


def _if_told(read: Callable[[], _T]) -> _T | None:
    """What `read` returns, or None where this GPU, driver or container does not tell."""
    try:
        return read()
    except pynvml.NVMLError as error:
        if error.value in _NOT_TOLD:
            return None
        raise


def _unreadable(index: int, uuid: str, problem: str) -> Gpu:
    return Gpu(
        uuid=uuid,
        index=str(index),
        name="unknown",
        total_bytes=0,
        free_bytes=0,
        visible_device=str(index),
        problem=f"NVML cannot read it: {problem}.",
    )


def _explain(error: Any) -> str:
    return f"{error} (NVML error {error.value})"


def _visible(found: list[_Found], visible_devices: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES names, in PCI order; as in CUDA, up to the first name of none or of several."""
    if visible_devices is None:
        return tuple(each.gpu for each in found)
    named: set[str] = set()
    for name in visible_devices.split(","):
        matches = [each for each in found if _names(name.strip(), each)]
        if len({each.parent_uuid for each in matches}) != 1:
            break
        named.update(each.gpu.uuid for each in matches)
    return tuple(each.gpu for each in found if each.gpu.uuid in named)


def _names(name: str, found: _Found) -> bool:
    """Whether an entry of CUDA_VISIBLE_DEVICES (index, or start of a uuid) means this GPU or the one it is part of."""
    if name.startswith(("GPU-", "MIG-")):
        return found.gpu.uuid.startswith(name) or found.parent_uuid.startswith(name)
    return name == found.gpu.index.partition(":")[0]


def _why_none(present: int, visible_devices: str | None) -> str:
    if not present:
        return "No GPU can be used: the driver shows none."
    return f"No GPU can be used: CUDA_VISIBLE_DEVICES={visible_devices!r} names none of the {present} that exist."

"""Which GPUs this machine has and who uses them, as NVML tells it. Looks only: it changes nothing on a GPU."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import pynvml as untyped_pynvml

from gpu_pool.gpu_choice import FoundGpu, GpuChoice
from gpu_pool.hardware import Gpu

_T = TypeVar("_T")
pynvml: Any = untyped_pynvml  # it makes its error classes as it is imported, where no type checker sees them
_DRIVER_GONE = (
    pynvml.NVML_ERROR_UNINITIALIZED,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
)
_LOST = (
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,  # a position that NVML has just counted
    pynvml.NVML_ERROR_UNKNOWN,
)
"""Answers for a GPU that has fallen off the bus, or cannot compute until it is reset."""
_NOT_TOLD = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
)
OPEN_SECONDS = 10.0
"""How long `Inventory.open` waits for NVML, which may hang for as long as a GPU does."""
_PROCESS_LIST_TRIES = 5  # the list may grow between asking for its length and reading it


class Inventory:
    """The GPUs that we may use. A look may take seconds, or hang with the driver: call it off the loop."""

    def __init__(self, visible_devices: str | None, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> None:
        """`visible_devices` is an inherited CUDA_VISIBLE_DEVICES: the set we may use; None: every GPU.

        `allow` and `deny` are the operator's lists; raises PoolError for an entry that cannot name a GPU.
        """
        self._choice = GpuChoice.of(visible_devices, allow, deny)
        self._turn = threading.Lock()
        self._initialised = False
        self._last: dict[int, list[FoundGpu]] = {}
        """What could last be read at each position."""
        self.seen: tuple[Gpu, ...] = ()
        """What the last look found."""
        self.has_library = True
        """Whether NVML is installed, as far as is known: otherwise there is no driver that may come back."""
        self.answers = False
        """Whether NVML answered at the last look, though it may have shown no GPU."""
        self.reason: str | None = None
        """Why the last look found no GPU, for people; None when it found one."""
        self.unknown: list[str] = []
        """What is wrong with the lists, by the GPUs of the last look: a sentence an entry that names none of them."""

    @classmethod
    def open(
        cls, environment: Mapping[str, str] = os.environ, allow: Iterable[str] = (), deny: Iterable[str] = ()
    ) -> Inventory:
        """An inventory that has looked once, unless NVML takes longer than OPEN_SECONDS.

        Without library, driver or permission it has no GPUs, and says why.
        """
        inventory = cls(environment.get("CUDA_VISIBLE_DEVICES"), allow, deny)
        look = threading.Thread(target=inventory.gpus, name="nvml", daemon=True)
        look.start()
        look.join(OPEN_SECONDS)
        return inventory

    @property
    def may_have_any(self) -> bool:
        """Whether there may be GPUs although none is seen: NVML is installed, and has not answered the last look."""
        return self.has_library and not self.answers and self._choice.may_be_any

    def gpus(self) -> tuple[Gpu, ...]:
        """A fresh look: usable GPUs in PCI order, MIG instances in place of the GPU that they divide.

        A GPU that cannot be read is listed with its `problem`. A driver that went away is asked again at each look.
        Only one thread at a time looks; others wait for it.
        """
        with self._turn:
            self.seen = self._look()
            return self.seen

    def _look(self) -> tuple[Gpu, ...]:
        try:
            self._initialise()
            found = [each for index in range(pynvml.nvmlDeviceGetCount()) for each in self._read(index)]
        except pynvml.NVMLError as error:
            self.close()
            self.answers = False
            self.has_library = error.value != pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
            self.reason = f"No GPU can be used: {_explain(error)}."
            return ()
        self.answers = self.has_library = True
        usable = self._choice.among(_by_uuid(found) if any(each.gpu.lost for each in found) else found)
        self.reason = None if usable else self._choice.why_none(found)
        self.unknown = self._choice.unknown(found)
        return usable

    def close(self) -> None:
        """Let NVML go; the next look takes it up again."""
        if self._initialised:
            self._initialised = False
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
        self._last.clear()

    def _initialise(self) -> None:
        if not self._initialised:
            pynvml.nvmlInit()
            self._initialised = True

    def _read(self, index: int) -> list[FoundGpu]:
        """What is at this position, in NVML's order: that of PCI, which CUDA_DEVICE_ORDER=PCI_BUS_ID means too."""
        uuid: str | None = None
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(pynvml.nvmlDeviceGetUUID(handle))
            parts = list(_read_mig(handle, index) if _mig_enabled(handle) else _read_whole(handle, index))
        except pynvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise
            return [_unreadable(each, error) for each in self._known_at(index, uuid)]
        self._last[index] = [FoundGpu(gpu=gpu, parent_uuid=uuid) for gpu in parts]
        return self._last[index]

    def _known_at(self, index: int, uuid: str | None) -> list[FoundGpu]:
        """What was there before: a lost GPU may not even tell its name, and keeps the identity it was known by."""
        last = self._last.get(index)
        if last and uuid in (None, last[0].parent_uuid):
            return last
        uuid = uuid or f"GPU-unknown-{index}"
        number = str(index)
        gpu = Gpu(uuid=uuid, index=number, name="unknown", total_bytes=0, free_bytes=0, visible_device=number)
        return [FoundGpu(gpu=gpu, parent_uuid=uuid)]


def _mig_enabled(handle: Any) -> bool:
    mode = _if_told(lambda: pynvml.nvmlDeviceGetMigMode(handle))
    return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE


def _read_whole(handle: Any, index: int) -> Iterator[Gpu]:
    yield _read_device(handle, str(index), str(index), handle)


def _read_mig(parent: Any, index: int) -> Iterator[Gpu]:
    for position in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, position)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            instance = _read_device(handle, f"{index}:{position}", uuid, parent)
        except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
            continue  # none there, or none any more: its handle names nothing from the moment at which it is destroyed
        yield instance


def _read_device(handle: Any, index: str, visible_device: str, whole: Any) -> Gpu:
    """A GPU or a part of it; what only the `whole` GPU is asked is asked there."""
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
        temperature_celsius=_if_told(lambda: pynvml.nvmlDeviceGetTemperature(whole, pynvml.NVML_TEMPERATURE_GPU)),
        uncorrectable_errors=_uncorrectable_errors(whole),
    )


def _uncorrectable_errors(handle: Any) -> int:
    """Memory errors that ECC could not correct, since the driver was loaded; 0 where there is no ECC."""
    kind, since = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return _if_told(lambda: pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, since)) or 0


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


def _by_uuid(found: list[FoundGpu]) -> list[FoundGpu]:
    """The same, to be named to CUDA by UUID: it may not count a lost GPU, and its numbers are not NVML's then."""
    return [
        msgspec.structs.replace(each, gpu=msgspec.structs.replace(each.gpu, visible_device=each.gpu.uuid))
        for each in found
    ]


def _unreadable(found: FoundGpu, error: Any) -> FoundGpu:
    problem = f"NVML cannot read it: {_explain(error)}."
    gpu = msgspec.structs.replace(
        found.gpu, free_bytes=0, processes=(), problem=problem, lost=error.value in _LOST, utilization_percent=None
    )
    return msgspec.structs.replace(found, gpu=gpu)


def _explain(error: Any) -> str:
    return f"{error} (NVML error {error.value})"

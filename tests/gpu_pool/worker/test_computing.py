"""Which errors of a chunk mean that the device is lost; what becomes of the worker then is tested as a service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from chunks import scoring

from gpu_pool.worker.computing import MAX_ERROR_CHARACTERS, compute, in_short, is_device_lost
from gpu_pool.worker.engine.shortage import is_out_of_memory

CPU = torch.device("cpu")


class Ended(BaseException):
    """The process has ended."""


def lost(reason: str) -> NoReturn:
    raise Ended(reason)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), False),
        (RuntimeError("cuBLAS error: out of memory"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_end_a_process(error: RuntimeError, is_lost: bool) -> None:
    assert is_device_lost(error, CPU) == is_lost


CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, …)`")
ASSERTED = torch.AcceleratorError("CUDA error: device-side assert triggered\n\nCUDA kernel errors might be …")
FALLEN_OFF = torch.AcceleratorError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize(
    ("error", "device_says", "is_lost"),
    [
        (CUBLAS, ASSERTED, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FALLEN_OFF, True),
        (RuntimeError("CUDA driver error: an illegal memory access was encountered"), RuntimeError("CUDA error"), True),
        (CUBLAS, None, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None, False),
    ],
)
def test_of_a_librarys_error_the_device_itself_is_asked(
    error: RuntimeError, device_says: RuntimeError | None, is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []

    def synchronize(device: torch.device) -> None:
        """As torch's on a GPU: what has gone wrong in a kernel is raised by whatever waits for it, ever after."""
        asked.append(device)
        if device_says:
            raise device_says

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert is_device_lost(error, torch.device("cuda", 1)) == is_lost
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ASSERTED])
def test_of_what_is_clear_the_device_is_not_asked(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cuda, "synchronize")
    assert is_device_lost(error, torch.device("cuda", 0)) == (error is ASSERTED)


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),  # not even a context could be made
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8000000000000 bytes."), True),
        (ASSERTED, False),
        (CUBLAS, False),
        (ValueError("a rope type out of memory"), False),
    ],
)
def test_which_errors_say_that_there_is_no_memory(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) == is_it


class Loaded:
    """Enough of a model that has no parameters: its first batch raises `error`."""

    device = CPU

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        raise self.error


def answers(error: Exception) -> Iterator[Any]:
    loaded: Any = Loaded(error)
    return compute(loaded, scoring([((5, 6), (7,))]), lambda: False, lambda: None, lost)


def test_a_lost_device_is_reported_instead_of_an_answer() -> None:
    with pytest.raises(Ended, match=r"^AcceleratorError: CUDA error: an illegal access$"):
        list(answers(torch.AcceleratorError("CUDA error: an illegal access\n\nCompile with …")))


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("too long")])
def test_other_errors_are_the_chunks(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        list(answers(error))


def test_errors_in_short() -> None:
    assert in_short(ValueError("  one\n  line\n\nand what nobody reads")) == "ValueError: one line"
    assert len(in_short(ValueError("x" * 1000))) == MAX_ERROR_CHARACTERS

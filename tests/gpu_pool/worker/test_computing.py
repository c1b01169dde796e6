"""Which errors of a chunk mean that the device is lost; what becomes of the worker then is tested as a service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import torch
from chunks import scoring

from gpu_pool.worker.computing import MAX_ERROR_CHARACTERS, compute, in_short, is_device_lost

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

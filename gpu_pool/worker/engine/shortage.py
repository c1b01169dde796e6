"""Errors that say that memory does not suffice."""

from __future__ import annotations

import torch

_SAID = (
    "out of memory",  # CUDA and the libraries on top of it
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN
    "can't allocate memory",  # torch on a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that a device has no memory left: to torch's allocator, or even to the libraries below it."""
    low = isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)
    return low or isinstance(error, torch.OutOfMemoryError)

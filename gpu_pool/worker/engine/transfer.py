# pyright: basic
"""Moves small arrays from the host to a device, together, and what has become of them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Each of `arrays` as a tensor on `device`: one copy for each type, which a GPU does not make the host wait for."""
    tensors: list[torch.Tensor | None] = [None] * len(arrays)
    for dtype in dict.fromkeys(array.dtype for array in arrays):
        places = [place for place, array in enumerate(arrays) if array.dtype == dtype]
        packed = torch.from_numpy(np.concatenate([arrays[place].ravel() for place in places]))
        if device.type == "cuda":
            packed = packed.pin_memory()  # else the copy would wait for what the GPU is doing
        packed = packed.to(device, non_blocking=True)
        pieces = packed.split([arrays[place].size for place in places])
        for place, piece in zip(places, pieces, strict=True):
            tensors[place] = piece.view(arrays[place].shape)
    return [tensor for tensor in tensors if tensor is not None]


class ToHost:
    """Copies of tensors of one device on their way to the host, which does other things until it asks for them."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrival: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._arrival = torch.cuda.Event()
            self._arrival.record(torch.cuda.current_stream(device))

    def lists(self) -> list[list[Any]]:
        """Wait for them, and for nothing that the device has been given since."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [copy.tolist() for copy in self._copies]

# pyright: basic
"""Moves small arrays from the host to a device, together."""

from __future__ import annotations

from collections.abc import Sequence

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

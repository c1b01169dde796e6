# pyright: basic
"""Reads `model_world_size_W_rank_R.pt`: what each rank saved of its model, as tensors that know their place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from gpu_pool.merge import rank_files
from gpu_pool.worker.merging.distcp import first_line
from gpu_pool.worker.merging.tensors import Box, MergeError, TensorType, check_cover, place_of


class RankTensors:
    """The weights in the files of all ranks, which are mapped and not read. Raises MergeError."""

    def __init__(self, folder: Path) -> None:
        files = rank_files(folder)
        world_size = max(files)[0]
        self._ranks = [_load(files[world_size, rank]) for rank in range(world_size)]
        self.types: Mapping[str, TensorType] = {
            name: TensorType(value.dtype, tuple(value.shape)) for name, value in self._ranks[0].items()
        }
        """As the first rank has them."""
        for name, whole in self.types.items():
            parts = [self._part(name, rank) for rank in range(world_size)]
            if any((part.dtype, tuple(part.shape)) != whole for part in parts):
                raise MergeError(f"{folder}: the ranks do not agree on the type or shape of {name}")
            check_cover(name, whole.shape, (_box(part, rank) for rank, part in enumerate(parts)))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, each rank's part put where its placement in the device mesh says."""
        whole = torch.empty(self.types[name].shape, dtype=self.types[name].dtype)
        for rank in range(len(self._ranks)):
            part = self._part(name, rank)
            whole[place_of(*_box(part, rank))] = part._local_tensor if isinstance(part, DTensor) else part
        return whole

    def _part(self, name: str, rank: int) -> torch.Tensor:
        if name not in self._ranks[rank]:
            raise MergeError(f"rank {rank} has not saved {name}, which rank 0 has")
        return self._ranks[rank][name]


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many classes, from zip archives to unpickling
        raise MergeError(f"{path} is damaged or truncated, or holds more than tensors: {first_line(error)}") from error
    if not isinstance(saved, dict):
        raise MergeError(f"{path} holds no state dictionary but {type(saved).__name__}")
    return {str(name): value for name, value in saved.items() if isinstance(value, torch.Tensor)}


def _box(value: torch.Tensor, rank: int) -> Box:
    """The part of the whole tensor that a rank holds."""
    if not isinstance(value, DTensor):
        return (0,) * value.dim(), tuple(value.shape)
    mesh = value.device_mesh.mesh
    coordinate = (mesh == rank).nonzero()[0].tolist()
    shape, offset = _compute_local_shape_and_global_offset(value.shape, mesh.shape, coordinate, value.placements)
    return tuple(offset), tuple(shape)

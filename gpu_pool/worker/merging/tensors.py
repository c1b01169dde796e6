# pyright: basic
"""What a sharded checkpoint is to the one who merges it: tensors by name, of known types, read one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from gpu_pool.errors import PoolError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: its offset in each dimension, and its size."""


class MergeError(PoolError):
    """The checkpoint cannot be merged."""


class TensorType(NamedTuple):
    """What is known of a tensor before it is read."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedTensors(Protocol):
    """The weights of a sharded checkpoint."""

    @property
    def types(self) -> Mapping[str, TensorType]:
        """By parameter name, in the order in which they are best read."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, whole. Raises MergeError."""
        ...


def check_cover(name: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Raise MergeError unless the parts lie in the tensor, are as many elements as it has, and do not overlap.

    Parts that are there twice, as replicas are, count once.
    """
    parts = sorted(set(boxes))
    for offset, size in parts:
        is_within = len(offset) == len(size) == len(shape) and all(
            start >= 0 and length >= 0 and start + length <= end
            for start, length, end in zip(offset, size, shape, strict=True)
        )
        if not is_within:
            raise MergeError(f"{name}: a shard of {list(size)} at {list(offset)} does not lie in {list(shape)}")
    filled = [part for part in parts if math.prod(part[1])]
    found, expected = sum(math.prod(size) for _, size in filled), math.prod(shape)
    if found != expected or _any_overlap(filled):
        raise MergeError(f"{name}: its shards hold {found} elements, some twice or not all, and it has {expected}")


def _any_overlap(parts: list[Box]) -> bool:
    """Of parts that are sorted by their offset: each is compared with those that reach beyond its beginning."""
    near: list[Box] = []
    for offset, size in parts:
        near = [(start, length) for start, length in near if start[0] + length[0] > offset[0]]
        if any(_overlap((offset, size), other) for other in near):
            return True
        near.append((offset, size))
    return False


def _overlap(one: Box, other: Box) -> bool:
    return all(
        start < other_start + other_length and other_start < start + length
        for start, length, other_start, other_length in zip(*one, *other, strict=True)
    )


def place_of(offset: Iterable[int], size: Iterable[int]) -> tuple[slice, ...]:
    """Where a part lies in its tensor."""
    return tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))

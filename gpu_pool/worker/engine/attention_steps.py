# pyright: basic
"""Two ways to compute spans: small ones padded, side by side, large ones alone; or all at once by their lengths.

A step belongs to one batch and serves all its layers. It is made on the host, as arrays that `place` moves to the
device; a layer's `Inputs` go in, and what its queries see there is merged into `Found`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_pool.worker.engine.kernels import HIDDEN, attend, merge
from gpu_pool.worker.engine.spans import Span
from gpu_pool.worker.engine.transfer import to_device
from gpu_pool.worker.engine.varlen_kernels import VarlenAttention

_FILL = 0.75
"""Least share of a padded group that is not padding."""
_SMALL = 256
"""Tokens of queries, and of keys, below which a span is worth grouping with others."""
MOST_COPIED = 1 << 15
"""Keys of spans that are computed together, of which each gets a copy: branches that leave a long sequence at places of
their own each look at all of it up to there. As many as a large pass has tokens are enough to fill any device."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a layer attends with."""

    layer: int
    query: torch.Tensor
    """[T, H, D]"""
    key: torch.Tensor
    """[T, K, D]"""
    value: torch.Tensor
    """[T, K, V]"""
    scale: float
    softcap: float | None
    varlen: VarlenAttention | None
    """What computes variable lengths, where something does."""


class Found:
    """What each query of the batch has found so far: result [T, H, V] and log-sum-exp [T, H], in fp32."""

    def __init__(self, inputs: Inputs) -> None:
        size, heads, _ = inputs.query.shape
        self.result = inputs.query.new_empty(size, heads, inputs.value.shape[-1], dtype=torch.float32)
        self.lse = inputs.query.new_empty(size, heads, dtype=torch.float32)

    def put(self, target: slice | torch.Tensor, result: torch.Tensor, lse: torch.Tensor, *, first: bool) -> None:
        """What the queries at `target` see is their `first`, or merged with what they have found elsewhere."""
        if not first:
            result, lse = merge(self.result[target], self.lse[target], result.float(), lse)
        self.result[target] = result if isinstance(target, slice) else result.float()  # a slice converts as it copies
        self.lse[target] = lse


class Step(ABC):
    """Attention of some of a batch's queries; `arrays` of the host are its `tensors` once it is placed."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.tensors: list[torch.Tensor] = []

    @abstractmethod
    def attend(self, inputs: Inputs, found: Found) -> None:
        """Add what the step's queries see in a layer to what they have `found`."""


def place(steps: Sequence[Step], device: torch.device) -> None:
    """Move what the steps need to the device, all together."""
    tensors = iter(to_device([array for step in steps for array in step.arrays], device))
    for step in steps:
        step.tensors = [next(tensors) for _ in step.arrays]


def group(spans: Iterable[Span], *, causal: bool, window: int | None, positions: np.ndarray) -> list[Step]:
    """Steps over all spans: small ones of similar sizes side by side."""
    steps: list[Step] = []
    small: list[Span] = []
    for span in spans:
        if span.block is not None or span.queries * span.length >= _SMALL**2:
            steps.append(PaddedGroup([span], causal, window, positions))
        else:
            small.append(span)
    small.sort(key=lambda span: (-span.length, -span.queries))
    members: list[Span] = []
    used = most = 0
    for span in small:
        most = max(most, span.queries)
        keys = (len(members) + 1) * (members[0].length if members else span.length)
        if members and (used + span.queries * span.length < _FILL * most * keys or keys > MOST_COPIED):
            steps.append(PaddedGroup(members, causal, window, positions))
            members, used, most = [], 0, span.queries
        members.append(span)
        used += span.queries * span.length
    if members:
        steps.append(PaddedGroup(members, causal, window, positions))
    return steps


def calls(spans: Sequence[Span]) -> list[Step]:
    """Steps over all spans, which see all of their keys, by their lengths: as a rule a single one."""
    steps: list[Step] = []
    first = copied = 0
    for place, span in enumerate(spans):
        if place > first and copied + span.length > MOST_COPIED:
            steps.append(VarlenCall(spans[first:place], causal=False))
            first, copied = place, 0
        copied += span.length
    return [*steps, VarlenCall(spans[first:], causal=False)]


class PaddedGroup(Step):
    """Spans [S] side by side, padded to the most queries Q and keys L; or a single one."""

    def __init__(self, spans: list[Span], causal: bool, window: int | None, positions: np.ndarray) -> None:
        super().__init__()
        self._spans, self._causal, self._window = spans, causal, window
        starts, key_starts, queries, lengths = _columns(spans)
        most, longest = int(queries.max()), int(lengths.max())
        places, key_places = np.arange(most), np.arange(longest)
        query_index = starts[:, None] + np.minimum(places, queries[:, None] - 1)  # padding repeats the last one
        if len(spans) > 1:
            key_index = key_starts[:, None] + np.minimum(key_places, lengths[:, None] - 1)
            real = np.flatnonzero(places < queries[:, None])
            self.arrays += [query_index, key_index, real, query_index.ravel()[real]]
        self._hides_far = window is not None and any(span.distance >= window for span in spans)
        self._masked = self._hides_far or (not causal and bool((lengths < longest).any()))
        if self._masked:
            key_positions = np.array([span.key_position for span in spans], dtype=np.int64)[:, None] + key_places
            self.arrays += [positions[query_index], key_positions, lengths]
        self._mask: torch.Tensor | None = None

    def attend(self, inputs: Inputs, found: Found) -> None:
        if self._masked and self._mask is None:
            self._mask = self._make_mask()
        query, keys, values = self._look_up(inputs)
        result, lse = attend(
            query.transpose(1, 2),
            keys,
            values,
            scale=inputs.scale,
            causal=self._causal and self._mask is None,
            mask=self._mask,
            softcap=inputs.softcap,
        )
        result, lse = result.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
        if len(self._spans) == 1:
            found.put(slice(self._spans[0].start, self._spans[0].end), result, lse, first=self._causal)
        else:
            real, target = self.tensors[2:4]
            found.put(target, result[real], lse[real], first=self._causal)

    def _look_up(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [S, Q, H, D], keys [S, K, L, D] and values [S, K, L, V]."""
        if len(self._spans) > 1:
            query_index, key_index = self.tensors[:2]
            keys, values = inputs.key[key_index], inputs.value[key_index]
            return inputs.query[query_index], keys.transpose(1, 2), values.transpose(1, 2)
        [span] = self._spans
        wanted = slice(span.key_start, span.key_start + span.length)
        query = inputs.query[None, span.start : span.end]
        if span.block is None:
            return query, inputs.key[None, wanted].transpose(1, 2), inputs.value[None, wanted].transpose(1, 2)
        keys, values = span.block.keys_values[inputs.layer]
        return query, keys[None, :, wanted], values[None, :, wanted]

    def _make_mask(self) -> torch.Tensor:
        """Mask [S, Q or 1, L]."""
        queries, keys, lengths = self.tensors[-3:]
        hidden = (torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None])[:, None]
        if self._hides_far:
            distance = queries[:, :, None] - keys[:, None]
            hidden = hidden | (distance >= (self._window or 0))
            if self._causal:
                hidden = hidden | (distance < 0)
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, HIDDEN)


class VarlenCall(Step):
    """Any spans by one call. A window is for causal ones alone: the others have to see all of their keys."""

    def __init__(self, spans: Sequence[Span], *, causal: bool, window: int | None = None) -> None:
        super().__init__()
        # kernels differ in which corner of an oblong they align the causal triangle to
        assert not causal or all(span.queries == span.length and span.block is None for span in spans)
        assert causal or window is None
        self._causal, self._window = causal, window
        inside = [span for span in spans if span.block is None]
        self._kept = [span for span in spans if span.block is not None]
        starts, key_starts, queries, lengths = _columns([*inside, *self._kept])
        self._longest_query, self._longest_key = int(queries.max()), int(lengths.max())
        self.arrays += [_bounds(queries), _bounds(lengths)]
        self._queries = self._collect(starts, queries)
        self._keys = self._collect(key_starts[: len(inside)], lengths[: len(inside)]) if inside else None

    def _collect(self, starts: np.ndarray, lengths: np.ndarray) -> slice | int:
        """Tokens of the batch: as a slice where they follow each other, else the place of their indices in `arrays`."""
        if (starts[1:] == starts[:-1] + lengths[:-1]).all():
            return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
        self.arrays.append(ranges(starts, lengths))
        return len(self.arrays) - 1

    def attend(self, inputs: Inputs, found: Found) -> None:
        assert inputs.varlen is not None
        target = self._queries if isinstance(self._queries, slice) else self.tensors[self._queries]
        keys, values = self._look_up(inputs)
        result, lse = inputs.varlen(
            inputs.query[target],
            keys,
            values,
            self.tensors[0],
            self.tensors[1],
            self._longest_query,
            self._longest_key,
            scale=inputs.scale,
            causal=self._causal,
            window=self._window,
        )
        found.put(target, result, lse, first=self._causal)

    def _look_up(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [tokens, K, D] and values [tokens, K, V], of the batch first."""
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        if self._keys is not None:
            wanted = self._keys if isinstance(self._keys, slice) else self.tensors[self._keys]
            keys.append(inputs.key[wanted])
            values.append(inputs.value[wanted])
        for span in self._kept:
            assert span.block is not None
            kept = span.block.keys_values[inputs.layer]
            for tensors, tensor in zip((keys, values), kept, strict=True):
                tensors.append(tensor[:, span.key_start : span.key_start + span.length].transpose(0, 1))
        return (keys[0], values[0]) if len(keys) == 1 else (torch.cat(keys), torch.cat(values))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, as many as its length, one after the other."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shift, lengths)


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Where each piece begins, and where the last one ends, as kernels for variable lengths want it."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _columns(spans: Sequence[Span]) -> np.ndarray:
    """Starts, key starts, numbers of queries and of keys [4, S]."""
    rows = [(span.start, span.key_start, span.end - span.start, span.length) for span in spans]
    return np.array(rows, dtype=np.int64).T

# pyright: basic
"""The sequences that are being continued: their keys and values, and one more token of attention for each at a time.

What many of them begin with stays in the blocks of the token tree, where all attend to it; only a sequence's own tokens
are in its slot.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from gpu_pool.worker.engine.blocks import Block, BlockPath
from gpu_pool.worker.engine.kernels import HIDDEN, attend, merge

_GROWTH = 64
"""Tokens by which slots grow at least when one is full."""


@dataclass(slots=True)
class _Shared:
    """Tokens start to end of a block, which some slots look back at."""

    block: Block
    start: int
    end: int
    slots: torch.Tensor
    """[rows]"""


@dataclass(slots=True)
class _Step:
    """What all layers need to know of the token that is computed."""

    own: torch.Tensor
    """Own tokens of each row before it [rows]."""
    starts: torch.Tensor
    """The position of each row's first own token [rows]."""
    mask: torch.Tensor
    """Which of the slots' tokens each row sees [rows, 1, most own tokens]."""
    windowed: dict[tuple[int, int], torch.Tensor]
    """By shared tokens and window: masks made so far."""


class Slots:
    """Rows 0 to `len` are in use. Stands in for an `AttentionPlan` while every row's next token is computed."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        """Rows there may be at once."""
        self.longest = sys.maxsize
        """Tokens of its own that a row may come to have."""
        self._device = device
        self._buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """By layer: keys and values [rows and more, heads, room, dimension]."""
        self._rows = self._room = 0
        """What the buffers have room for."""
        self._paths: list[BlockPath] = []
        """What precedes each row's own tokens."""
        self._lengths: list[int] = []
        """Own tokens of each row."""
        self._shared: list[_Shared] | None = None
        """None when rows have come or gone."""
        self._step: _Step

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def held(self) -> int:
        """Rows that the buffers have room for, or were to have when memory did not suffice."""
        return self._rows

    @property
    def bytes(self) -> int:
        """Memory of the buffers."""
        return sum(tensor.nbytes for pair in self._buffers.values() for tensor in pair)

    def add(self, path: BlockPath, shared: int) -> None:
        """One row more, that goes on after `path`; its first `shared` tokens stay where they are."""
        row, own = len(self), path.end - shared
        self._grow(row + 1, own + 1)
        for block, length in path.sources:
            first = max(shared - block.start, 0)
            if first >= length:
                continue
            for layer, (keys, values) in block.keys_values.items():
                to_keys, to_values = self._buffer(layer, keys, values)
                place = slice(block.start + first - shared, block.start + length - shared)
                to_keys[row, :, place] = keys[:, first:length]
                to_values[row, :, place] = values[:, first:length]
        self._paths.append(path.until(shared))
        self._lengths.append(own)
        self._shared = None

    def remove(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        last = len(self) - 1
        if row != last:
            for keys, values in self._buffers.values():
                keys[row], values[row] = keys[last], values[last]
            self._paths[row], self._lengths[row] = self._paths[last], self._lengths[last]
        self._paths.pop()
        self._lengths.pop()
        self._shared = None

    def next_positions(self) -> torch.Tensor:
        """Make room for one token more in each row, and say at which position it will be [rows]."""
        self._grow(len(self), max(self._lengths) + 1)
        if self._shared is None:
            self._shared = self._find_shared()
        own = torch.tensor(self._lengths, device=self._device)
        starts = torch.tensor([path.end for path in self._paths], device=self._device)
        hidden = torch.arange(max(self._lengths) + 1, device=self._device) > own[:, None]
        mask = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, HIDDEN)[:, None]
        self._step = _Step(own, starts, mask, {})
        return starts + own

    def advance(self) -> None:
        """The tokens are computed."""
        self._lengths = [length + 1 for length in self._lengths]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `AttentionPlan.attend`: one token of each row."""
        rows, step = len(self), self._step
        keys, values = self._buffer(layer, key[0, :, None], value[0, :, None])
        keys[torch.arange(rows, device=self._device), :, step.own] = key
        values[torch.arange(rows, device=self._device), :, step.own] = value
        used = step.mask.shape[-1]
        own_mask = step.mask if window is None else step.mask + self._far(window, used)
        result, lse = attend(
            query[:, :, None],
            keys[:rows, :, :used],
            values[:rows, :, :used],
            scale=scale,
            mask=own_mask,
            softcap=softcap,
        )
        result, lse = result[:, :, 0].float(), lse[:, :, 0]
        for shared in self._shared or ():
            mask = self._shared_mask(shared, window)
            block_keys, block_values = shared.block.keys_values[layer]
            queries = query if len(shared.slots) == rows else query[shared.slots]
            found, found_lse = attend(
                queries.transpose(0, 1)[None],
                block_keys[None, :, shared.start : shared.end],
                block_values[None, :, shared.start : shared.end],
                scale=scale,
                mask=mask,
                softcap=softcap,
            )
            found, found_lse = found[0].transpose(0, 1).float(), found_lse[0].transpose(0, 1)
            if queries is query:
                result, lse = merge(result, lse, found, found_lse)
            else:
                merged = merge(result[shared.slots], lse[shared.slots], found, found_lse)
                result[shared.slots], lse[shared.slots] = merged
        if sinks is not None:
            result = result * torch.sigmoid(lse - sinks.float()).unsqueeze(-1)
        return result.to(query.dtype)

    def _far(self, window: int, used: int) -> torch.Tensor:
        """Mask [rows, 1, used] that hides own tokens beyond the window."""
        distance = self._step.own[:, None] - torch.arange(used, device=self._device)
        return torch.zeros(distance.shape, device=self._device).masked_fill_(distance >= window, HIDDEN)[:, None]

    def _shared_mask(self, shared: _Shared, window: int | None) -> torch.Tensor | None:
        if window is None:
            return None
        key = id(shared), window
        if key not in self._step.windowed:
            queries = (self._step.starts + self._step.own)[shared.slots]
            keys = shared.block.start + torch.arange(shared.start, shared.end, device=self._device)
            distance = queries[:, None] - keys
            mask = torch.zeros(distance.shape, device=self._device).masked_fill_(distance >= window, HIDDEN)
            self._step.windowed[key] = mask[None]
        return self._step.windowed[key]

    def _find_shared(self) -> list[_Shared]:
        """Shared tokens and who looks at them: pieces of blocks that all their rows see whole."""
        users: dict[Block, list[tuple[int, int]]] = {}
        for row, path in enumerate(self._paths):
            for block, length in path.sources:
                users.setdefault(block, []).append((length, row))
        found: list[_Shared] = []
        for block, rows in users.items():
            start = 0
            for end in sorted({length for length, _ in rows}):
                slots = torch.tensor([row for length, row in rows if length >= end], device=self._device)
                found.append(_Shared(block, start, end, slots))
                start = end
        return found

    def _grow(self, rows: int, room: int) -> None:
        if rows <= self._rows and room <= self._room:
            return
        if rows > self._rows:
            self._rows = min(self.most, max(rows, 2 * self._rows))
        if room > self._room:
            self._room = max(room, min(self._room + _GROWTH, self.longest))
            self._rows = max(rows, min(self._rows, self.most))  # with longer ones there may be fewer than there were
        for layer, pair in self._buffers.items():
            keys, values = (self._grown(tensor) for tensor in pair)
            self._buffers[layer] = keys, values

    def _grown(self, tensor: torch.Tensor) -> torch.Tensor:
        rows, _, room, _ = tensor.shape
        return torch.nn.functional.pad(tensor, (0, 0, 0, self._room - room, 0, 0, 0, self._rows - rows))

    def _buffer(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's buffers; `keys` and `values` [heads, tokens, dimension] show what it holds."""
        if layer not in self._buffers:
            first, second = (
                tensor.new_zeros(self._rows, tensor.shape[0], self._room, tensor.shape[-1]) for tensor in (keys, values)
            )
            self._buffers[layer] = first, second
        return self._buffers[layer]

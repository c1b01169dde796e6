# pyright: basic
"""Attention inside a batch of blocks: the function that transformers' models call instead of their own.

A model is given the blocks of a batch as one sequence of tokens [1, T]. Its attention layers then call
`packed_attention`, which looks up the batch's `AttentionPlan`: which queries look at which keys (`spans`), and the
steps that compute it (`attention_steps`), a few calls of a kernel each; their results are merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface

from gpu_pool.worker.engine.attention_steps import Found, Inputs, Step, VarlenCall, calls, group, place, ranges
from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.spans import in_window, spans_by_depth
from gpu_pool.worker.engine.varlen_kernels import VarlenAttention, varlen_kernel

NAME = "evalpool_packed"
"""In transformers' table of attention implementations. No mask function is registered under it, so none is built."""

KeysValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""By layer, (keys, values) [heads, tokens, dimension] of a block's first tokens."""
ChooseVarlen = Callable[[torch.Tensor, torch.Tensor, float | None], VarlenAttention | None]
"""What computes variable lengths for a layer's query, value and soft-cap, if anything does (`varlen_kernels`)."""


class CannotAttend(Exception):
    """A layer asks for something that packed attention does not do."""


class AttentionPlan:
    """What attends to what in one batch; made once, on the host, and used by every layer."""

    def __init__(
        self, blocks: Sequence[Block], device: torch.device, choose_varlen: ChooseVarlen = varlen_kernel
    ) -> None:
        self._device = device
        self._choose_varlen = choose_varlen
        lengths = np.array([len(block.tokens) for block in blocks], dtype=np.int64)
        firsts = np.array([block.start for block in blocks], dtype=np.int64)
        self.size = int(lengths.sum())
        """Tokens of the batch."""
        self.starts = dict(zip(blocks, (np.cumsum(lengths) - lengths).tolist(), strict=True))
        """Where each block begins in the batch."""
        self.positions = ranges(firsts, lengths)
        """Of each token in its sequence."""
        self._depths = spans_by_depth(blocks, self.starts)
        self._furthest = max(span.distance for spans in self._depths for span in spans)
        self._steps: dict[tuple[int | None, bool], list[Step]] = {}
        """By window, and whether by variable lengths."""
        self._kept = [block for block in blocks if block.users]
        for block in self._kept:
            block.keys_values = {}

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
        """Result [T, H, V] for `query` [T, H, D] and the batch's own `key` [T, K, D] and `value` [T, K, V]."""
        self._keep(layer, key, value)
        varlen = self._choose_varlen(query, value, softcap)
        inputs = Inputs(layer, query, key, value, scale, softcap, varlen)
        found = Found(inputs)
        for step in self._steps_for(window, varlen is not None):
            step.attend(inputs, found)
        if sinks is not None:  # a key without a value: it only takes weight away
            found.result.mul_(torch.sigmoid(found.lse - sinks.float()).unsqueeze(-1))
        return found.result.to(query.dtype)

    def _keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for block in self._kept:
            start = self.starts[block]
            end = start + block.reach
            block.keys_values[layer] = (
                key[start:end].transpose(0, 1).contiguous(),
                value[start:end].transpose(0, 1).contiguous(),
            )

    def _steps_for(self, window: int | None, by_lengths: bool) -> list[Step]:
        """In order: every query's own block comes first. Made when the first layer of a kind asks for them."""
        if window is not None and window > self._furthest:
            window = None
        if (window, by_lengths) not in self._steps:
            steps = list(self._make_steps(window, by_lengths))
            place(steps, self._device)
            self._steps[window, by_lengths] = steps
        return self._steps[window, by_lengths]

    def _make_steps(self, window: int | None, by_lengths: bool) -> Iterator[Step]:
        for depth, all_spans in enumerate(self._depths):
            causal = depth == 0
            spans = all_spans if window is None else in_window(all_spans, window)
            if by_lengths and causal:
                yield VarlenCall(spans, causal=True, window=window)
                continue
            if by_lengths:
                # a kernel's window is counted from the end of the keys, but queries come later by some distance of
                # their own: spans that the edge of the window cuts through get a mask instead
                whole = [span for span in spans if window is None or span.distance < window]
                spans = [span for span in spans if window is not None and span.distance >= window]
                if whole:
                    yield from calls(whole)
            yield from group(spans, causal=causal, window=window, positions=self.positions)


_plan: AttentionPlan | None = None


@contextmanager
def attending_by(plan: AttentionPlan | Any) -> Iterator[None]:
    """Let the models' attention layers follow `plan`."""
    global _plan
    before, _plan = _plan, plan
    try:
        yield
    finally:
        _plan = before


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: `query` [1, H, T, D], `key` and `value` [1, K, T, D], result [1, T, H, D].

    Raises:
        CannotAttend: outside `attending_by`, or with a bias of a kind that is unknown here.
    """
    layer = getattr(module, "layer_idx", None)
    if _plan is None or layer is None or position_bias is not None or attention_mask is not None or is_causal is False:
        raise CannotAttend
    result = _plan.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return result[None], None


AttentionInterface.register(NAME, packed_attention)

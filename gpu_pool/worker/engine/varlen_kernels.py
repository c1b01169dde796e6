# pyright: basic
"""Attention of many sequences by one call, whatever their lengths, with the log-sum-exp.

By the package flash-attn, by torch, or as written on paper.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, Protocol

import torch
from torch.nn.attention import varlen

from gpu_pool.worker.engine.kernels import HIDDEN, attend_plain, causal_mask, has_flash

_TORCH_HAS_VARLEN = {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen.varlen_attn).parameters)
"""Its first versions could not do as much."""


class VarlenAttention(Protocol):
    """Attention of many sequences by one call, whatever their lengths."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        longest_query: int,
        longest_key: int,
        *,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(result [Tq, H, D], log-sum-exp [Tq, H] in fp32) of `query` [Tq, H, D] over `key` and `value` [Tk, K, D].

        Sequence i has the queries `query_starts[i]` to `query_starts[i + 1]` and the keys `key_starts[i]` to
        `key_starts[i + 1]` (int32, N + 1 each, none empty) and attends to no other. `causal` (as many keys as queries
        in each) lets query j see keys 0 to j, of those the last `window`.
        """
        ...


def varlen_kernel(query: torch.Tensor, value: torch.Tensor, softcap: float | None) -> VarlenAttention | None:
    """The fastest there is for tensors like these: flash-attn's if it is installed, or torch's own; None if none is."""
    if softcap is not None or query.shape[-1] != value.shape[-1] or not has_flash(query):
        return None
    if _flash_attn() is not None:
        return attend_varlen_flash_attn
    return attend_varlen_torch if _TORCH_HAS_VARLEN else None


def attend_varlen_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`VarlenAttention` by torch's own flash attention."""
    result, lse = varlen.varlen_attn(
        query,
        key,
        value,
        query_starts,
        key_starts,
        longest_query,
        longest_key,
        return_aux=varlen.AuxRequest(lse=True),
        scale=scale,
        window_size=_window_size(causal, window),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result, lse.transpose(0, 1)  # it comes as [H, Tq]


def attend_varlen_flash_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`VarlenAttention` by the package flash-attn."""
    result, lse, _ = _flash_attn()(
        query,
        key,
        value,
        query_starts,
        key_starts,
        longest_query,
        longest_key,
        softmax_scale=scale,
        causal=causal,
        window_size=_window_size(causal, window),
        return_attn_probs=True,
    )
    return result, lse.transpose(0, 1)  # it comes as [H, Tq]


def attend_varlen_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`VarlenAttention` as written on paper, a sequence at a time: on any device, in any type, for comparison."""
    results: list[torch.Tensor] = []
    sums: list[torch.Tensor] = []
    queries, keys = query_starts.diff().tolist(), key_starts.diff().tolist()
    pieces = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    for some_query, some_key, some_value in pieces:
        mask = causal_mask(len(some_query), query.device) if causal else None
        if mask is not None and window is not None:
            mask = mask + torch.full_like(mask, HIDDEN).tril_(-window)
        batch = (tensor.transpose(0, 1)[None] for tensor in (some_query, some_key, some_value))
        result, lse = attend_plain(*batch, scale, mask, None)
        results.append(result[0].transpose(0, 1))
        sums.append(lse[0].transpose(0, 1))
    return torch.cat(results), torch.cat(sums)


def _window_size(causal: bool, window: int | None) -> tuple[int, int]:
    """(keys before, keys after) the query's own that it sees, as flash attention counts them; -1 for all."""
    return (-1 if window is None else window - 1, 0) if causal else (-1, -1)


@functools.cache
def _flash_attn() -> Any:
    """flash-attn's function, if the package is installed and gives the log-sum-exp as [H, Tq]."""
    try:
        package = importlib.import_module("flash_attn")
    except ImportError:
        return None
    version = tuple(int(part) for part in package.__version__.split(".")[:2])
    return package.flash_attn_varlen_func if version >= (2, 7) else None

# pyright: basic
"""Attention of queries over one set of keys, with the log-sum-exp that lets results over several sets be merged.

Attention over keys A and B is a weighted mean of attention over A and over B, with weights exp(lse_A) and exp(lse_B):
the online softmax of Milakov and Gimelshein (2018), as flash and cascade attention use it between sets of keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

HIDDEN = -3e4
"""Added to hidden scores: finite in every type, so that a query that sees nothing has no weight instead of NaN."""
_TILE_BYTES = 1 << 20
"""Scores that are held at once on a CPU: what stays in its cache between the steps of the softmax."""
_FEW_QUERIES = 64
"""Queries of a head that make too small a matrix product, on a CPU and on a GPU."""
_GPU_TILE_BYTES = 1 << 28
"""And on a GPU: enough to fill it, little beside its memory."""

FusedKernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""`attend_cpu` or `attend_gpu`."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result [B, H, Q, V], log-sum-exp [B, H, Q] in fp32) of `query` [B, H, Q, D] over `key` [B, K, L, D].

    `key` and `value` [B, K, L, V] have K heads, each for H / K heads of the query. `causal` (Q = L) lets query i see
    keys 0 to i; `mask` [B or 1, Q or 1, L] is added to the scores; `softcap` bounds the scores before.
    """
    fused = softcap is None and query.shape[-1] == value.shape[-1]
    if fused and (query.device.type == "cpu" or has_flash(query)):
        kernel = attend_cpu if query.device.type == "cpu" else attend_gpu
        return attend_fused(query, key, value, scale, causal, mask, kernel=kernel)
    if causal:
        mask = causal_mask(query.shape[2], query.device)
    return attend_plain(query, key, value, scale, mask, softcap)


def merge(
    result: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from that over each; results [..., V], log-sum-exps [...], in fp32."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(result, other, weight), torch.logaddexp(lse, other_lse)


def causal_mask(size: int, device: torch.device) -> torch.Tensor:
    """Mask [1, size, size] in fp32 that hides what follows a query."""
    return torch.full((1, size, size), HIDDEN, device=device).triu_(1)


def attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    *,
    kernel: FusedKernel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By one of torch's fused kernels.

    Where each head alone has few queries, those of all heads with the same keys become queries of one: the keys are
    read once for all of them. A token that is continued looks at its keys that way.
    """
    batch, heads, queries, dim = query.shape
    if queries == 1 or (queries <= _FEW_QUERIES and mask is None and not causal):
        query, causal = query.reshape(batch, key.shape[1], -1, dim), False
    result, lse = kernel(query, key, value, scale, causal, mask)
    return result.reshape(batch, heads, queries, dim), lse.reshape(batch, heads, queries)


def attend_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash attention for the CPU."""
    bias = None if mask is None else mask[:, None].to(query.dtype)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )


def attend_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's kernels for a GPU: flash attention without a mask, memory-efficient attention with one.

    Flash attention lets heads have keys in common. The other does not: there they are queries of one head, each with a
    mask of its own, where such masks are smaller than keys and values of its own for each head.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    if mask is None:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return found[0], found[1][..., :queries]
    groups = heads // kv_heads
    if groups > 1 and queries > 2 * kv_heads * dim:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        groups = 1
    query = query.reshape(batch, heads // groups, groups * queries, dim)
    width = -(-keys // 8) * 8  # the kernel wants rows of the bias aligned to 16 bytes
    bias = query.new_zeros((batch, 1, groups, queries, width))
    bias[..., :keys] += mask[:, None, None].to(query.dtype)
    bias = bias.flatten(2, 3)[..., :keys].expand(-1, heads // groups, -1, -1)
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, False, scale=scale
    )
    return found[0], found[1][..., : groups * queries]


def attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As written on paper: scores, softmax, weighted sum; in tiles of queries."""
    batch, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    tile_bytes = _TILE_BYTES if query.device.type == "cpu" else _GPU_TILE_BYTES
    rows = max(16, tile_bytes // (4 * batch * heads * key.shape[2]))
    if rows >= queries:
        return _attend_tile(query, key, value, groups, scale, mask, softcap)
    tiles = []
    for start in range(0, queries, rows):
        tile_mask = mask[:, start : start + rows] if mask is not None and mask.shape[1] > 1 else mask
        tile = query[:, :, start : start + rows]
        tiles.append(_attend_tile(tile, key, value, groups, scale, tile_mask, softcap))
    results, sums = zip(*tiles, strict=True)
    return torch.cat(results, dim=2), torch.cat(sums, dim=2)


def _attend_tile(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: int,
    scale: float,
    mask: torch.Tensor | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    folded = query.reshape(batch, kv_heads, groups * queries, -1)
    scores = (folded @ key.transpose(-1, -2)).float().mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.view(batch, kv_heads, groups, queries, keys).add_(mask[:, None, None])
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    result = weights.div_(total).to(value.dtype) @ value  # in half precision sums of many values may overflow
    lse = highest.add_(total.log())
    return result.view(batch, heads, queries, -1), lse.view(batch, heads, queries)


def has_flash(query: torch.Tensor) -> bool:
    """Whether flash attention is written for `query` [..., D]: half precision, on NVIDIA's Ampere or later."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and _capability(query.device) >= (8, 0)
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)

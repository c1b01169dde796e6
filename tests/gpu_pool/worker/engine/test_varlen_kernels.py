"""Attention of sequences of many lengths at once against the formula, each sequence by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gpu_pool.worker.engine.varlen_kernels import (
    attend_varlen_plain,
    attend_varlen_torch,
    varlen_kernel,
)

LENGTHS = [(1, 1), (5, 9), (33, 2), (7, 7), (1, 40)]
"""Of each sequence's queries and keys."""
SCALE = 0.3


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result [Q, H, D], log-sum-exp [Q, H]) of one sequence, in fp64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.double().transpose(0, 1) @ key.transpose(-1, -2) * SCALE
    distance = torch.arange(len(query))[:, None] - torch.arange(key.shape[1])
    if causal:
        scores = scores.masked_fill((distance < 0) | (distance >= (window or len(query))), -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1), scores.logsumexp(-1).transpose(0, 1)


def make_inputs(lengths: list[tuple[int, int]], kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key, value, and where the queries and the keys of each sequence begin."""
    generator = torch.Generator().manual_seed(0)
    starts = [
        torch.tensor([0, *row], dtype=torch.int32).cumsum(0, dtype=torch.int32) for row in zip(*lengths, strict=True)
    ]
    query = torch.randn(int(starts[0][-1]), 4, 16, generator=generator)
    key, value = torch.randn(2, int(starts[1][-1]), kv_heads, 16, generator=generator)
    return [*(x.to(dtype) for x in (query, key, value)), *starts]


def assert_equal_alone(kernel, lengths, kv_heads, causal, window, dtype, device):
    inputs = make_inputs(lengths, kv_heads, dtype)
    longest = (max(queries for queries, _ in lengths), max(keys for _, keys in lengths))
    moved = [tensor.to(device) for tensor in inputs]
    result, lse = kernel(*moved, *longest, scale=SCALE, causal=causal, window=window)
    assert (result.dtype, lse.dtype) == (dtype, torch.float32)
    query, key, value, query_starts, key_starts = inputs
    queries, keys = query_starts.diff().tolist(), key_starts.diff().tolist()
    pieces = zip(query.split(queries), key.split(keys), value.split(keys), strict=True)
    results, sums = zip(*(expected(*piece, causal, window) for piece in pieces), strict=True)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result.double().cpu(), torch.cat(results), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double().cpu(), torch.cat(sums), rtol=tolerance, atol=tolerance)


KINDS = [
    (LENGTHS, False, None),
    *(([(keys, keys) for _, keys in LENGTHS], True, window) for window in (None, 1, 3, 40)),
]


def on_this_machine() -> list[tuple[Any, torch.dtype, str]]:
    """(kernel, type, device)"""
    cases: list[tuple[Any, torch.dtype, str]] = [
        (attend_varlen_plain, torch.float32, "cpu"),
        (attend_varlen_plain, torch.bfloat16, "cpu"),
    ]
    if torch.cuda.is_available():
        query = torch.zeros(1, 4, 16, dtype=torch.bfloat16, device="cuda")
        kernels = {attend_varlen_plain, attend_varlen_torch, varlen_kernel(query, query, None)} - {None}
        cases += [(kernel, dtype, "cuda") for kernel in kernels for dtype in (torch.float16, torch.bfloat16)]
    return cases


@pytest.mark.parametrize(("kernel", "dtype", "device"), on_this_machine())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("lengths", "causal", "window"), KINDS)
def test_each_sequence_attends_to_itself_alone(lengths, causal, window, kv_heads, kernel, dtype, device):
    assert_equal_alone(kernel, lengths, kv_heads, causal, window, dtype, device)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("lengths", "causal", "window"), KINDS)
def test_torch_takes_what_its_kernel_is_given(lengths, causal, window, kv_heads):
    """Names and kinds of arguments, and shapes of what comes back; without a GPU nothing is computed."""
    inputs = [tensor.to("meta") for tensor in make_inputs(lengths, kv_heads, torch.bfloat16)]
    result, lse = attend_varlen_torch(*inputs, 40, 40, scale=SCALE, causal=causal, window=window)
    assert result.shape == inputs[0].shape
    assert lse.shape == inputs[0].shape[:2]
    assert lse.dtype == torch.float32


def test_none_on_a_cpu():
    query = torch.zeros(3, 4, 16, dtype=torch.bfloat16)
    assert varlen_kernel(query, query, None) is None

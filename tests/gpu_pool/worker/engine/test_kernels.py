"""Attention with its log-sum-exp against the formula, computed in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_pool.worker.engine.kernels import HIDDEN, attend, attend_fused, attend_gpu, attend_plain, causal_mask, merge

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's softmax, every head with keys of its own."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, None].double()
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def assert_close(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    tolerance = TOLERANCE[found[0].dtype]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def random_mask(rows: int, queries: int, keys: int, device: str) -> torch.Tensor:
    """About half hidden; every query sees the first key."""
    hidden = torch.rand(rows, queries, keys, generator=torch.Generator().manual_seed(5)) < 0.5
    hidden[..., 0] = False
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (5, 9), (33, 70)])
def test_equals_softmax_attention(queries, keys, kv_heads, value_dim, softcap, dtype, device):
    query, key, value = (
        random(3, heads, length, dim, seed=seed, dtype=dtype, device=device)
        for seed, (heads, length, dim) in enumerate(
            [(4, queries, 16), (kv_heads, keys, 16), (kv_heads, keys, value_dim)]
        )
    )
    masks = [None, *(random_mask(rows, some, keys, device) for rows in (1, 3) for some in (1, queries))]
    for mask in masks:
        found = attend(query, key, value, scale=0.3, mask=mask, softcap=softcap)
        assert_close(found, expected(query, key, value, 0.3, mask=mask, softcap=softcap))
        assert found[1].dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("value_dim", [16, 24])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 65])
def test_causal(size, kv_heads, value_dim, softcap, dtype, device):
    query, key, value = (
        random(2, heads, size, dim, seed=seed, dtype=dtype, device=device)
        for seed, (heads, dim) in enumerate([(4, 16), (kv_heads, 16), (kv_heads, value_dim)])
    )
    found = attend(query, key, value, scale=0.25, causal=True, softcap=softcap)
    assert_close(found, expected(query, key, value, 0.25, causal=True, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_tiles_of_queries(softcap):
    """More scores than are held at once."""
    query, key, value = random(2, 4, 300, 8), random(2, 2, 900, 8, seed=1), random(2, 2, 900, 12, seed=2)
    assert 4 * query[..., 0].numel() * 900 > 2 << 20
    for mask in (None, random_mask(2, 300, 900, "cpu"), random_mask(2, 1, 900, "cpu")):
        found = attend(query, key, value, scale=0.3, mask=mask, softcap=softcap)
        assert_close(found, expected(query, key, value, 0.3, mask=mask, softcap=softcap))
    causal = attend(query, key[:, :, :300], value[:, :, :300], scale=0.3, causal=True, softcap=softcap)
    assert_close(causal, expected(query, key[:, :, :300], value[:, :, :300], 0.3, causal=True, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("cuts", [[20], [1, 2, 50]])
def test_merging_is_attention_over_all_keys(cuts, queries, softcap):
    query, key, value = random(2, 4, queries, 16), random(2, 2, 53, 16, seed=1), random(2, 2, 53, 16, seed=2)
    parts = [
        attend(query, some_keys, some_values, scale=0.3, softcap=softcap)
        for some_keys, some_values in zip(key.tensor_split(cuts, dim=2), value.tensor_split(cuts, dim=2), strict=True)
    ]
    found = parts[0]
    for part in parts[1:]:
        found = merge(*found, *part)
    assert_close(found, expected(query, key, value, 0.3, softcap=softcap))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [1, 6])
def test_what_is_wholly_hidden_weighs_nothing(queries, softcap, dtype):
    query, key, value = (random(2, heads, n, 16, dtype=dtype) for heads, n in ((4, queries), (2, 9), (2, 9)))
    result, lse = attend(query, key, value, scale=0.3, softcap=softcap)
    seen = result.float(), lse
    mask = torch.full((1, 1, 7), HIDDEN)
    other_key, other_value = random(2, 2, 7, 16, seed=8, dtype=dtype), random(2, 2, 7, 16, seed=9, dtype=dtype)
    result, lse = attend(query, other_key, other_value, scale=0.3, mask=mask, softcap=softcap)
    hidden = result.float(), lse
    assert all(tensor.isfinite().all() for tensor in hidden)
    for merged in (merge(*seen, *hidden), merge(*hidden, *seen)):
        torch.testing.assert_close(merged, seen, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_as_exact_as_its_values(dtype):
    """However many keys weigh alike: neither does their sum overflow, nor is what it is divided by rounded."""
    query, key = torch.zeros(1, 1, 4, 8, dtype=dtype), torch.zeros(1, 1, 3001, 8, dtype=dtype)
    value = (40 + random(1, 1, 3001, 12)).to(dtype)
    result, lse = attend_plain(query, key, value, 0.3, None, 2.0)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(
        result.double(), value.double().mean(2, keepdim=True).expand(-1, -1, 4, -1), rtol=step, atol=0
    )
    assert lse.sub(math.log(3001)).abs().max() < 1e-5


def test_causal_mask():
    assert causal_mask(3, torch.device("cpu")).tolist() == [
        [[0, HIDDEN, HIDDEN], [0, 0, HIDDEN], [0, 0, 0]],
    ]


class Allocations(TorchDispatchMode):
    """Sizes of the tensors that operations make, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        some = made if isinstance(made, tuple) else (made,)
        self.sizes += (x.numel() for x in some if isinstance(x, torch.Tensor) and not x._is_view())
        return made


@pytest.mark.parametrize(
    ("rows", "queries", "mask", "causal"),
    [
        (6, 1, (6, 1, 400), False),  # a token of each row that is continued: its own tokens
        (1, 6, None, False),  # and those that all rows share
        (1, 6, (1, 6, 400), False),  # within a window
        (1, 70, None, False),
        (1, 400, None, True),
    ],
)
def test_a_gpu_reads_keys_that_heads_share_where_they_are(rows, queries, mask, causal):
    """What torch's kernels are given; nothing is computed without a GPU."""
    query = torch.empty(rows, 8, queries, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(rows, 2, 400, 64, dtype=torch.bfloat16, device="meta")
    seen = None if mask is None else torch.empty(mask, device="meta")
    with Allocations() as made:
        result, lse = attend_fused(query, key, key, 0.3, causal, seen, kernel=attend_gpu)
    assert result.shape == query.shape
    assert lse.shape == query.shape[:3]
    assert max(made.sizes) <= max(query.numel(), key.numel() // 2)


def flash(query, key, value, dropout=0.0, causal=False, return_mask=False, *, scale):
    """What torch's flash attention for a GPU promises, as written on paper; it takes no mask."""
    result, lse = expected(query, key, value, scale, causal=causal)
    nothing = torch.empty(0)
    return result.to(query.dtype), lse.float(), nothing, nothing, 0, 0, nothing, nothing, nothing


def efficient(query, key, value, bias, compute_lse, dropout=0.0, causal=False, *, scale):
    """And its memory-efficient attention: a mask for each head, as many keys as heads, lines of sums padded to 32."""
    assert query.shape[1] == key.shape[1] == bias.shape[1]
    assert bias.stride(-2) % 8 == 0
    scores = (query @ key.transpose(-1, -2)).float() * scale + bias.float()
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32))
    return scores.softmax(-1).to(value.dtype) @ value, lse, torch.empty(0), torch.empty(0)


@pytest.fixture
def gpu_kernels() -> Iterator[None]:
    """torch's operations for a GPU, on the CPU."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_flash_attention", flash, "CPU")
        library.impl("_scaled_dot_product_efficient_attention", efficient, "CPU")
        yield


@pytest.mark.usefixtures("gpu_kernels")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 37), (5, 9), (33, 70), (65, 70)])
def test_the_way_to_a_gpus_kernels(queries, keys, kv_heads):
    """Heads with keys in common, and the masks of their queries, are put together and taken apart rightly."""
    query, key, value = (
        random(3, heads, n, 16, seed=n) for heads, n in ((4, queries), (kv_heads, keys), (kv_heads, keys))
    )
    masks = [None, *(random_mask(rows, some, keys, "cpu") for rows in (1, 3) for some in (1, queries))]
    for mask in masks:
        found = attend_fused(query, key, value, 0.3, False, mask, kernel=attend_gpu)
        assert_close(found, expected(query, key, value, 0.3, mask=mask))
    own = random(3, kv_heads, queries, 16, seed=7)
    found = attend_fused(query, own, own, 0.3, True, None, kernel=attend_gpu)
    assert_close(found, expected(query, own, own, 0.3, causal=True))

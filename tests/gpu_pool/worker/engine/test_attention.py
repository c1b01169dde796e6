"""Attention inside batches of blocks against attention of each sequence alone, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from engine_probes import plain_varlen_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import distinct, room_for, tokens_alone, trees

from gpu_pool.worker.engine import attention_steps
from gpu_pool.worker.engine.attention import AttentionPlan, CannotAttend, attending_by, packed_attention
from gpu_pool.worker.engine.blocks import Block, Tokens
from gpu_pool.worker.engine.packed import release
from gpu_pool.worker.engine.token_tree import lay_out, pack
from gpu_pool.worker.engine.varlen_kernels import attend_varlen_plain, attend_varlen_torch, varlen_kernel

CPU = torch.device("cpu")
WAYS = {"by spans": varlen_kernel, "by lengths": plain_varlen_kernel}
"""What a CPU chooses, and what a GPU does."""
HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.3


@dataclass
class Options:
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


OPTIONS = {
    "plain": Options(),
    "window": Options(window=5),
    "wide window": Options(window=40),
    "soft-cap": Options(softcap=1.5),
    "sinks": Options(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": Options(window=7, softcap=1.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


class Vectors:
    """A query, a key and a value for each node of the tree of `sequences`, by the tokens up to there."""

    def __init__(self, sequences: Sequence[Tokens], value_dim: int = DIM) -> None:
        nodes = {tokens[: end + 1] for tokens in sequences for end in range(len(tokens))}
        self._index = {node: index for index, node in enumerate(sorted(nodes))}
        random = torch.Generator().manual_seed(0)
        self.query = torch.randn(len(nodes), HEADS, DIM, generator=random)
        self.key = torch.randn(len(nodes), KV_HEADS, DIM, generator=random)
        self.value = torch.randn(len(nodes), KV_HEADS, value_dim, generator=random)

    def rows(self, tokens: Tokens, start: int = 0) -> torch.Tensor:
        """Rows of the vectors at positions `start` on."""
        return torch.tensor([self._index[tokens[: end + 1]] for end in range(start, len(tokens))])


def alone(vectors: Vectors, tokens: Tokens, options: Options) -> torch.Tensor:
    """Result [T, H, V] of one sequence by softmax, in fp64."""
    rows = vectors.rows(tokens)
    query = vectors.query[rows].double().transpose(0, 1)
    key, value = (x[rows].double().transpose(0, 1).repeat_interleave(2, dim=0) for x in (vectors.key, vectors.value))
    scores = query @ key.transpose(-1, -2) * SCALE
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    places = torch.arange(len(tokens))
    distance = places[:, None] - places
    hidden = (distance < 0) | (distance >= (options.window or len(tokens)))
    scores = scores.masked_fill(hidden, -torch.inf)
    if options.sinks is not None:
        sinks = options.sinks.double()[:, None, None].expand(-1, len(tokens), 1)
        return (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value).transpose(0, 1)
    return (scores.softmax(-1) @ value).transpose(0, 1)


def along_tree(
    vectors: Vectors, sequences: Sequence[Tokens], options: Options, *, longest_block: int, room: int, way: str
) -> tuple[list[torch.Tensor], list[Block]]:
    """(the result of each sequence, all blocks) by plans of batches of at most `room` tokens."""
    layout = lay_out(sequences, [0] * len(sequences), longest_block=longest_block)
    spelt = {
        block: tokens[: block.start + length]
        for tokens, path in zip(sequences, layout.paths, strict=True)
        for block, length in path.sources
        if length == len(block.tokens)
    }

    results: dict[tuple[Block, int], torch.Tensor] = {}
    for batch in pack(layout.blocks, tokens_alone, room_for(room)):
        plan = AttentionPlan(batch, CPU, WAYS[way])
        rows = torch.cat([vectors.rows(spelt[block], block.start) for block in batch])
        found = plan.attend(
            0,
            vectors.query[rows],
            vectors.key[rows],
            vectors.value[rows],
            scale=SCALE,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
        )
        places = [(block, index) for block in batch for index in range(len(block.tokens))]
        results.update(zip(places, found, strict=True))
        for block in batch:
            release(block.path.sources)
    paths = zip(sequences, layout.paths, strict=True)
    return [torch.stack([results[at] for at in path.locate(0, len(tokens))]) for tokens, path in paths], layout.blocks


def assert_equal_alone(
    sequences: Sequence[Tokens], options: Options, *, longest_block: int, room: int, way: str, value_dim: int = DIM
) -> None:
    vectors = Vectors(sequences, value_dim)
    found, blocks = along_tree(vectors, sequences, options, longest_block=longest_block, room=room, way=way)
    for tokens, ours in zip(sequences, found, strict=True):
        torch.testing.assert_close(ours.double(), alone(vectors, tokens, options), rtol=1e-4, atol=1e-5)
    assert all(block.users == 0 and block.keys_values is None for block in blocks)


@settings(max_examples=150)
@given(
    trees(),
    st.sampled_from(sorted(OPTIONS)),
    st.sampled_from([3, 50, 10**9]),
    st.sampled_from([1, 40, 10**9]),
    st.sampled_from(sorted(WAYS)),
)
def test_equals_each_sequence_alone(sequences, options, longest_block, room, way):
    assert_equal_alone(sequences, OPTIONS[options], longest_block=longest_block, room=room, way=way)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("room", [400, 10**9])
@pytest.mark.parametrize("way", WAYS)
def test_large_and_small_spans(way, room, options):
    """Blocks that are computed apart, and groups of such as are not."""
    hub = tuple(range(300))
    sequences = [hub + (1000 + ray,) * (5 + 60 * (ray % 4)) for ray in range(12)]
    sequences += [hub[:cut] + (2000 + cut,) * 30 + (tail,) * 7 for cut in range(20, 280, 60) for tail in range(3)]
    assert_equal_alone(distinct(sequences), OPTIONS[options], longest_block=10**9, room=room, way=way)


@pytest.mark.parametrize("way", WAYS)
def test_values_of_another_dimension(way):
    sequences = distinct([(0,) * 20 + (ray,) * 9 for ray in range(5)])
    assert_equal_alone(sequences, Options(), longest_block=10**9, room=35, way=way, value_dim=12)


@pytest.mark.parametrize("way", WAYS)
def test_queries_that_look_at_several_blocks_of_one_size(way):
    """Looks at two blocks that are of one shape are not computed side by side if they are the same queries'."""
    examples = (0,) * 100
    question = examples + (2,) * 90
    sequences = distinct([examples + (1,) * 900, *(question + (3 + answer,) * 30 for answer in range(10))])
    assert_equal_alone(sequences, Options(), longest_block=10**9, room=10**9, way=way)


@pytest.mark.parametrize(("window", "expected"), [(None, 3), (10**6, 3), (31, 2)])
def test_by_lengths_a_depth_is_one_call(window, expected):
    """However many spans it has, of this batch and of earlier ones; what a window cuts through takes others."""
    hub = (0,) * 30
    sequences = distinct(hub + (1 + ray,) * 20 + (50 + leaf,) * (1 + leaf) for ray in range(6) for leaf in range(5))
    layout = lay_out(sequences, [0] * len(sequences), longest_block=10**9)
    calls: list[tuple[int, bool]] = []

    def count(*args, **kwargs):
        calls.append((len(args[3]) - 1, kwargs["causal"]))
        return attend_varlen_plain(*args, **kwargs)

    vectors = Vectors(sequences)
    first, rest = layout.blocks[:2], layout.blocks[2:]
    for batch in (first, rest):
        calls.clear()
        plan = AttentionPlan(batch, CPU, lambda *_: count)
        query, key, value = (x[: plan.size] for x in (vectors.query, vectors.key, vectors.value))
        plan.attend(0, query, key, value, scale=SCALE, window=window, softcap=None, sinks=None)
    assert len(rest) > 20
    assert calls[0] == (len(rest), True)
    assert len(calls) == expected
    assert not any(causal for _, causal in calls[1:])


@pytest.mark.parametrize("room", [100, 10**9])
@pytest.mark.parametrize("way", WAYS)
def test_keys_that_are_copied_are_bounded(way, room, monkeypatch):
    """Thirty branches leave a line at places of their own, in its pass or later: each looks at all before its place."""
    copied: list[int] = []
    attend, attend_by_lengths = attention_steps.attend, attend_varlen_plain

    def count_spans(query, key, *args, **kwargs):
        if not kwargs["causal"]:
            copied.append(key.shape[0] * key.shape[2])
        return attend(query, key, *args, **kwargs)

    def count_lengths(query, key, *args, **kwargs):
        if not kwargs["causal"]:
            copied.append(len(key))
        return attend_by_lengths(query, key, *args, **kwargs)

    monkeypatch.setattr(attention_steps, "attend", count_spans)
    monkeypatch.setattr(attention_steps, "MOST_COPIED", 300)
    monkeypatch.setitem(WAYS, "by lengths", lambda *_: count_lengths)
    line = tuple(range(100))
    comb = distinct([line, *((*line[:place], 200 + place, 7) for place in range(65, 95))])
    assert_equal_alone(comb, Options(), longest_block=10**9, room=room, way=way)
    assert max(copied) <= 300
    if way == "by lengths":
        assert len(copied) <= 15
        copied.clear()
        fork = distinct([line, *((*line[:90], 200 + ray, 7) for ray in range(30))])
        assert_equal_alone(fork, Options(), longest_block=10**9, room=10**9, way=way)
        assert copied == [90]


@pytest.mark.parametrize("window", [None, 31, 45])
@pytest.mark.parametrize("kernel", [attend_varlen_torch, None])
def test_the_host_never_waits_for_the_device(kernel, window):
    """Tensors on `meta` hold nothing: asking one for a number, as a GPU would have to be waited for, is an error."""
    hub = (0,) * 30
    sequences = distinct(hub + (1 + ray,) * 20 + (50 + leaf,) * (1 + leaf) for ray in range(6) for leaf in range(5))
    layout = lay_out(sequences, [0] * len(sequences), longest_block=10**9)
    for batch in (layout.blocks[:2], layout.blocks[2:]):
        plan = AttentionPlan(batch, torch.device("meta"), lambda *_: kernel)
        query = torch.empty(plan.size, HEADS, DIM, dtype=torch.bfloat16, device="meta")
        key = torch.empty(plan.size, KV_HEADS, DIM, dtype=torch.bfloat16, device="meta")
        sinks = torch.empty(HEADS, device="meta")
        result = plan.attend(0, query, key, key, scale=SCALE, window=window, softcap=None, sinks=sinks)
        assert (result.shape, result.dtype) == (query.shape, query.dtype)


def test_only_what_is_looked_back_at_is_kept():
    sequences = distinct([(0,) * 50 + (1,) * 50, (0,) * 50 + (2,) * 30])
    layout = lay_out(sequences, [0, 0], longest_block=10**9)
    first, second = layout.blocks
    vectors = Vectors(sequences)
    rows = vectors.rows(sequences[0])
    query, key, value = vectors.query[rows], vectors.key[rows], vectors.value[rows]
    options = {"scale": SCALE, "window": None, "softcap": None, "sinks": None}
    AttentionPlan([first], CPU).attend(3, query, key, value, **options)
    keys, values = first.keys_values[3]
    torch.testing.assert_close(keys, key[:50].transpose(0, 1), rtol=0, atol=0)
    torch.testing.assert_close(values, value[:50].transpose(0, 1), rtol=0, atol=0)
    assert keys.untyped_storage().nbytes() == keys.nbytes  # no view that would hold the whole batch
    assert second.keys_values is None


def test_unknown_kinds_of_attention_are_refused():
    module = torch.nn.Module()
    module.layer_idx = 0
    block = lay_out([(1, 2)], [0], longest_block=9).blocks[0]
    query, key = torch.randn(1, HEADS, 2, DIM), torch.randn(1, KV_HEADS, 2, DIM)
    with pytest.raises(CannotAttend):
        packed_attention(module, query, key, key, None)
    with attending_by(AttentionPlan([block], CPU)):
        result, _ = packed_attention(module, query, key, key, None)
        assert result.shape == (1, 2, HEADS, DIM)
        for unknown in ({"position_bias": query}, {"is_causal": False}, {"attention_mask": query}):
            with pytest.raises(CannotAttend):
                packed_attention(module, query, key, key, **({"attention_mask": None} | unknown))
        with pytest.raises(CannotAttend):
            packed_attention(torch.nn.Module(), query, key, key, None)

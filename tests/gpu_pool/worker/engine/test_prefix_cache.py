"""What is kept between chunks: the bound, the order of forgetting, and that kept beginnings are not computed again."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from chunks import generating, scoring
from engine_probes import assert_kept_for_the_cache_alone, fresh, never, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from token_trees import distinct, trees

from gpu_pool.worker.engine.blocks import Block, Tokens
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.packed import finish
from gpu_pool.worker.engine.prefix_cache import MIN_TOKENS, MOST_KEPT, PrefixCache, release_all
from gpu_pool.worker.engine.token_tree import Layout, lay_out

TOKEN_BYTES = 32
"""Of the keys and values that `compute` gives each token."""


def compute(cache: PrefixCache, sequences: Sequence[Tokens], *, shared_by: int = 8, keep: bool = True) -> Layout:
    """Do with `cache` what a chunk of `sequences` does, without a model."""
    needed_from = [len(tokens) - 1 for tokens in sequences]
    known = [(tokens, path) for tokens, path, _ in cache.find(sequences)]
    layout = lay_out(sequences, needed_from, longest_block=200, known=known)
    reserved = cache.reserve(layout, sequences, len(sequences) - 1, shared_by=shared_by)
    for block in layout.blocks:
        if block.users:
            block.keys_values = {0: (torch.zeros(1, block.reach, 4), torch.zeros(1, block.reach, 4))}
    finish(layout.blocks)
    if keep:
        cache.keep(reserved)
    else:
        release_all(reserved)
    return layout


def line(first: int, length: int) -> Tokens:
    return (first,) * length


def knows(cache: PrefixCache, tokens: Tokens) -> int:
    """How many first tokens of a sequence are known."""
    return max((len(found.tokens) for found in cache.find([tokens])), default=0)


def test_forgets_what_was_used_longest_ago():
    cache = PrefixCache(250 * TOKEN_BYTES, TOKEN_BYTES)
    compute(cache, [line(1, 100)])
    compute(cache, [line(2, 100)])
    assert knows(cache, line(1, 100)) == 100  # a use
    compute(cache, [line(3, 100)])
    assert [knows(cache, line(first, 100)) for first in (1, 2, 3)] == [100, 0, 100]
    assert cache.bytes == 200 * TOKEN_BYTES


def test_keeps_nothing_where_there_is_no_memory():
    cache = PrefixCache(2 * MIN_TOKENS * TOKEN_BYTES - 1, TOKEN_BYTES)
    layout = compute(cache, [line(1, 100)])
    assert (len(cache), cache.bytes) == (0, 0)
    assert all(block.keys_values is None and block.users == 0 for block in layout.blocks)


@pytest.mark.parametrize("length", [150, 190, 700, 3000])
def test_a_long_document_leaves_the_others_where_they_are(length):
    """It is kept as far as half of the memory goes, and no further than its blocks are needed for that."""
    cache = PrefixCache(300 * TOKEN_BYTES, TOKEN_BYTES)
    examples = distinct((*line(1, 100), 9, question) for question in range(10))
    compute(cache, examples)
    compute(cache, distinct((*line(2, length), 3, choice) for choice in range(4)))
    assert [knows(cache, line(first, length)) for first in (1, 2)] == [100, min(150, length)]
    assert cache.bytes <= 300 * TOKEN_BYTES
    compute(cache, examples)
    compute(cache, distinct((*line(3, length), 3, choice) for choice in range(4)))
    assert [knows(cache, line(first, length)) for first in (1, 2, 3)] == [100, 0, min(150, length)]


def test_beginnings_of_one_chunk_are_no_more_than_there_is_memory_for():
    cache = PrefixCache(300 * TOKEN_BYTES, TOKEN_BYTES)
    layout = lay_out(
        sequences := distinct((*line(subject, 90), 9, question) for subject in range(9) for question in range(10)),
        [91] * 90,
        longest_block=200,
    )
    reserved = cache.reserve(layout, sequences, len(sequences) - 1)
    blocks = {source.block: source.length for beginning in reserved for source in beginning.path.sources}
    assert 200 < sum(blocks.values()) <= 300
    assert reserved[-1].tokens == sequences[-1]
    release_all(reserved)


def test_blocks_of_two_grids_share_the_memory():
    cache = PrefixCache(250 * TOKEN_BYTES, TOKEN_BYTES)
    other = cache.of_grid(4)
    compute(cache, [line(1, 100)])
    compute(other, [line(2, 100)])
    assert [knows(cache, line(1, 100)), knows(other, line(1, 100))] == [100, 0]
    assert [knows(cache, line(2, 100)), knows(other, line(2, 100))] == [0, 100]
    compute(cache, [line(3, 100)])
    assert [knows(cache, line(1, 100)), knows(other, line(2, 100)), knows(cache, line(3, 100))] == [0, 100, 100]
    assert cache.bytes == other.bytes == 200 * TOKEN_BYTES
    other.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_short_beginnings_are_not_kept():
    cache = PrefixCache(10**6, TOKEN_BYTES)
    compute(cache, [line(1, MIN_TOKENS - 1)])
    assert len(cache) == 0
    compute(cache, [line(2, 100)])
    assert cache.find([(*line(2, MIN_TOKENS - 1), 9)]) == []
    assert knows(cache, (*line(2, MIN_TOKENS), 9)) == MIN_TOKENS
    assert cache.find([]) == []


def test_beginnings_that_many_share_are_kept():
    cache = PrefixCache(10**6, TOKEN_BYTES)
    compute(cache, distinct((*line(subject, 50), 9, question) for subject in (1, 2) for question in range(10)))
    assert knows(cache, (*line(1, 50), 7)) == 50
    assert knows(cache, (*line(2, 50), 7)) == 50
    rare = PrefixCache(10**6, TOKEN_BYTES)
    compute(rare, distinct((*line(subject, 50), 9, question) for subject in (1, 2) for question in range(7)))
    assert knows(rare, (*line(1, 50), 7)) == 0


def test_short_beginnings_that_many_share_are_kept():
    """But a single token, and what only resembles one, are as soon computed."""
    cache = PrefixCache(10**6, TOKEN_BYTES)
    compute(cache, [(1, 2, question) for question in range(20)])
    assert knows(cache, (1, 2, 77)) == 2
    assert knows(cache, (1, 3, 77)) == 0
    compute(cache, [(5, question) for question in range(20)])
    assert knows(cache, (5, 77)) == 0


def test_beginnings_within_and_beside_each_other():
    """Blocks that several beginnings share are held once, and stay until the last one goes."""
    cache = PrefixCache(10**6, TOKEN_BYTES)
    long, branch = line(1, 300), line(1, 100) + line(2, 200)
    compute(cache, [long])
    assert compute(cache, [long[:150]]).tokens == 1  # the last token is needed
    assert compute(cache, [branch]).tokens == 200
    assert cache.bytes == (300 + 1 + 200) * TOKEN_BYTES
    assert [knows(cache, tokens) for tokens in (long, branch, long[:150], (*line(1, 120), 3))] == [300, 300, 150, 120]
    blocks = {source.block for _, path, _ in cache._kept.values() for source in path.sources}
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)
    assert all(block.users == 0 and block.keys_values is None for block in blocks)


def test_what_one_chunk_went_on_with_grows_old():
    """The ends of chunks that are not asked for again go before a beginning that is."""
    hub, other = line(1, 100), line(2, 100)
    cache = PrefixCache((len(hub) + len(other) + 6 * 50) * TOKEN_BYTES, TOKEN_BYTES)
    compute(cache, [hub])
    for chunk in range(20):
        if chunk % 3 == 0:
            assert chunk == 0 or knows(cache, other) == 100
            compute(cache, [other])
        sequences = distinct((*hub, 10 * chunk + question, *line(3, 49)) for question in range(9))
        assert cache.find(sequences)[0].tokens == hub
        assert len(cache.find(sequences)) == 1
        compute(cache, sequences)


def test_the_same_beginning_again_is_held_once():
    cache = PrefixCache(10**6, TOKEN_BYTES)
    for _ in range(3):
        compute(cache, [line(1, 100)])
    assert len(cache) == 1
    assert all(path.end == 100 for _, path, _ in cache._kept.values())
    assert cache.bytes <= (100 + 1) * TOKEN_BYTES


def test_abandoned_chunk_leaves_nothing():
    cache = PrefixCache(10**6, TOKEN_BYTES)
    compute(cache, [line(1, 100)])
    before = [(block, block.users) for _, path, _ in cache._kept.values() for block, _ in path.sources]
    layout = compute(cache, distinct([line(1, 100) + line(2, 100), line(3, 50)]), keep=False)
    assert all(block.users == 0 and block.keys_values is None for block in layout.blocks)
    assert [(block, block.users) for block, _ in before] == before


@settings(max_examples=60)
@given(st.lists(trees(), min_size=1, max_size=6), st.sampled_from([0, 40, 300, 10**6]))
def test_bound_and_users(chunks, most):
    """However beginnings overlap, the bound holds, all that is known is computed, and everything goes in the end."""
    cache = PrefixCache(most * TOKEN_BYTES, TOKEN_BYTES)
    blocks: list[Block] = []
    for sequences in chunks:
        for tokens, path, _ in cache.find(sequences):
            assert tuple(token for block, length in path.sources for token in block.tokens[:length]) == tokens
            for block, length in path.sources:
                keys, values = block.keys_values[0]
                assert keys.shape[1] >= length <= values.shape[1]
        blocks += compute(cache, sequences, shared_by=2).blocks
        assert cache.bytes <= most * TOKEN_BYTES
        kept = {source.block for _, path, _ in cache._kept.values() for source in path.sources}
        assert {block for block in blocks if block.keys_values is not None} == kept
    cache.clear()
    assert all(block.users == 0 and block.keys_values is None for block in blocks)


# -------------------------------------------------------------------------------------------------------- with a model


def questions(seed: int, count: int = 12) -> list[tuple[Tokens, Tokens]]:
    """Requests after the same 60 tokens, and then 5 of their own."""
    source = random.Random(seed)
    return [
        (
            (*range(20, 80), 100 + seed * count + question, *(source.randrange(3, 300) for _ in range(4))),
            (source.randrange(3, 300),),
        )
        for question in range(count)
    ]


def test_next_chunk_does_not_compute_shared_beginnings_again(checkpoint, load):
    loaded = fresh(load(checkpoint("llama")))
    with watched(loaded) as first:
        score(loaded, scoring(questions(0)), never)
    with watched(loaded) as second:
        warm = score(loaded, scoring(questions(1)), never)
    assert sum(first.read) == 60 + 12 * 5
    assert sum(second.read) == 12 * 5
    assert_kept_for_the_cache_alone(loaded)
    cold = score(fresh(loaded), scoring(questions(1)), never)
    assert [greedy for _, greedy in warm] == [greedy for _, greedy in cold]
    assert all(abs(ours[0] - theirs[0]) <= 1e-5 * abs(theirs[0]) for ours, theirs in zip(warm, cold, strict=True))


def test_scoring_and_generation_share_what_is_kept(checkpoint, load):
    loaded = fresh(load(checkpoint("llama")))
    prompts = [context for context, _ in questions(2)]
    with watched(loaded) as alone:
        cold = generate(fresh(loaded), generating(prompts, max_gen_toks=8), never)
    score(loaded, scoring(questions(0)), never)
    with watched(loaded) as after:
        warm = generate(loaded, generating(prompts, max_gen_toks=8), never)
    assert warm == cold
    assert sum(alone.read) - sum(after.read) == 60
    with watched(loaded) as scored:
        score(loaded, scoring([(prompts[0] + (5,), (6,))]), never)
    assert sum(scored.read) <= 6
    assert_kept_for_the_cache_alone(loaded)


def test_chunks_of_one_long_text(checkpoint, load):
    """The last sequence of a chunk is kept: where the next one goes on."""
    loaded = fresh(load(checkpoint("llama")))
    text = tuple(3 + index * index % 290 for index in range(200))
    with watched(loaded) as passes:
        for end in range(50, 200, 50):
            score(loaded, scoring([(text[:end], text[end : end + 1])]), never)
    assert passes.read == [50, 50, 50]


@pytest.mark.parametrize("prefix_bytes", [0, 20_000])
def test_little_or_no_memory_for_beginnings(prefix_bytes, checkpoint, load):
    whole, small = fresh(load(checkpoint("llama"))), fresh(load(checkpoint("llama")), prefix_bytes=prefix_bytes)
    for seed in range(3):
        chunk = scoring(questions(seed))
        for ours, theirs in zip(score(small, chunk, never), score(whole, chunk, never), strict=True):
            assert abs(ours[0] - theirs[0]) <= 1e-5 * abs(theirs[0])
        assert small.prefix_cache.bytes <= prefix_bytes
        assert_kept_for_the_cache_alone(small)


def test_beginnings_are_bounded_in_number():
    cache = PrefixCache(1 << 30, TOKEN_BYTES)
    for seed in range(MOST_KEPT + 20):
        compute(cache, [line(seed, 40)])
    assert len(cache) <= MOST_KEPT

"""Shared tokens that are scored are computed once in all chunks of a job, and answer as if they were computed again."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from chunks import generating, scoring
from cut_as_sent import Pair, as_sent, trie_size
from engine_probes import assert_kept_for_the_cache_alone, fresh, never, plainly, watched
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval_answers import assert_agree
from token_trees import needs, trees

from gpu_pool.evaluator.chunking import MIN_COST
from gpu_pool.worker.engine.blocks import Tokens, common_prefix
from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.kept_scores import Scores, comparable, find_scores
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.token_tree import GRID

_SOURCE = random.Random()


@pytest.fixture(autouse=True)
def same_tokens_in_each_test() -> None:
    _SOURCE.seed(5)


def some(count: int) -> Tokens:
    return tuple(_SOURCE.randrange(3, 300) for _ in range(count))


def long_shared_scored_part() -> list[Pair]:
    context, shared = some(50), some(150)
    return [(context, (*shared, *some(50))) for _ in range(100)]


def deep() -> list[Pair]:
    """A binary tree of scored tokens, whose branches leave a kept path at every depth."""
    continuations: list[Tokens] = [()]
    for _ in range(6):
        continuations = [(*tokens, branch, *some(24)) for tokens in continuations for branch in (1, 2)]
    context = some(30)
    return [(context, tokens) for tokens in continuations]


def comb() -> list[Pair]:
    """Continuations that leave one scored line ever later: each needs an output of the line that nobody asked for."""
    context, line = some(20), some(170)
    return [(context, (*line[:end], *some(60))) for end in range(2, 170, 2)]


def growing() -> list[Pair]:
    """A scored text that goes on a little in each request: a chunk asks for what several before it have scored."""
    context, line = some(5), some(240)
    return [(context, line[:end]) for end in range(2, 240, 2)]


def shallow() -> list[Pair]:
    return [(some(2), some(40)) for _ in range(100)]


def several_tasks() -> list[Pair]:
    few_shot, own = some(120), some(60)
    choices = [((*few_shot, question, *some(20)), some(3)) for question in range(40) for _ in range(4)]
    return [*choices, *long_shared_scored_part(), *[((*few_shot, *own), (*some(1), *own, *some(9))) for _ in range(20)]]


SHAPES: dict[str, Callable[[], list[Pair]]] = {
    "long shared scored part": long_shared_scored_part,
    "deep": deep,
    "comb": comb,
    "growing": growing,
    "shallow": shallow,
    "several tasks": several_tasks,
}


def short_prefix() -> list[Pair]:
    """Single tokens after few of their own, behind a beginning of 15."""
    beginning = some(15)
    questions = [(*beginning, *some(2)) for _ in range(120)]
    return [(question, (choice,)) for question in questions for choice in (1, 2, 3, 4)]


def every_place() -> list[Pair]:
    """Single tokens at every place of one text, and others than those that follow there."""
    line = some(200)
    return [(line[:end], some(1)) for end in range(1, 200) for _ in range(4)]


def branches() -> list[Pair]:
    """Two tokens of their own at every place of a text that is longer than a chunk: half of them sort after it."""
    line = some(240)
    return [(line[:end], some(3)) for end in range(1, 240)]


def nested_branches() -> list[Pair]:
    """The same, where what leaves the text is another one that is left everywhere."""
    line = some(120)
    others = [(*line[:end], *some(60)) for end in range(10, 120, 10)]
    return [(other[:end], some(3)) for other in [line, *others] for end in range(1, len(other))]


def short_prefixes() -> list[Pair]:
    """Hundreds of them, distinct, with choices of one token and of two."""
    return [(context, (choice, *some(choice % 2))) for context in map(some, [3] * 150) for choice in (3, 4, 5)]


SHORT: dict[str, Callable[[], list[Pair]]] = {
    "short prefix": short_prefix,
    "every place": every_place,
    "short prefixes": short_prefixes,
    "branches": branches,
    "nested branches": nested_branches,
    "empty contexts": lambda: [((0,), some(1 + number % 5)) for number in range(300)],
    "repeats": lambda: [pair for pair in short_prefixes() for _ in range(3)],
}


def in_chunks(pairs: Sequence[Pair], size: int = 20) -> list[list[Pair]]:
    """As an evaluator cuts them."""
    ordered = sorted(set(pairs), key=lambda pair: pair[0] + pair[1])
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_distinct_token_of_a_job_is_computed_about_once(shape, checkpoint, load):
    loaded, chunks = fresh(load(checkpoint("llama"))), in_chunks(SHAPES[shape]())
    assert len(chunks) > 3
    with watched(loaded) as passes:
        found = [answer for chunk in chunks for answer in score(loaded, scoring(chunk), never)]
    pairs = list(itertools.chain.from_iterable(chunks))
    assert sum(passes.read) <= 1.05 * trie_size(pairs)
    assert_agree(found, score(plainly(loaded), scoring(pairs), never))
    assert_kept_for_the_cache_alone(loaded)


@pytest.mark.parametrize("shape", SHORT)
def test_short_requests_are_computed_about_once_even_in_the_smallest_chunks(shape, checkpoint, load):
    loaded, pairs = fresh(load(checkpoint("llama"))), SHORT[shape]()
    chunks = as_sent(pairs, MIN_COST)
    assert len(chunks) > 2
    with watched(loaded) as passes:
        for chunk in chunks:
            score(loaded, scoring(chunk), never)
    assert sum(passes.read) <= 1.05 * trie_size(pairs)


def test_a_chunk_of_one_context_computes_one_token_again(checkpoint, load):
    """Its last one: what else may follow there than what has been asked before, nobody knows."""
    loaded, context = fresh(load(checkpoint("llama"))), some(30)
    with watched(loaded) as passes:
        for _ in range(5):
            score(loaded, scoring([(context, some(1)) for _ in range(200)]), never)
    assert passes.read == [30, 1, 1, 1, 1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
def test_kept_scores_are_the_same_bits_where_they_must_be(model_type, checkpoint, load):
    """Whatever other chunks have left: blocks of other lengths, blocks that go on otherwise, and the same ones."""
    loaded, context, shared = fresh(load(checkpoint(model_type))), some(20), some(200)
    ends = [*range(90, 200, 10), 107, 108, 109, 110]
    pairs = [(context, (*shared[:end], *some(1 + end % 25))) for end in ends]
    pairs += [((*context, *shared[:50]), (*shared[50:end], *some(9))) for end in ends]
    alone = [score(fresh(loaded), scoring([pair], deterministic=True), never)[0] for pair in pairs]
    order = _SOURCE.sample(range(len(pairs)), len(pairs))
    for chunk in (order[start : start + 4] for start in range(0, len(order), 4)):
        found = score(loaded, scoring([pairs[index] for index in chunk], deterministic=True), never)
        assert list(found) == [alone[index] for index in chunk]
    score(loaded, scoring([(context, shared)], deterministic=True), never)
    with watched(loaded) as passes:
        score(loaded, scoring([(context, (*shared[:150], *some(20)))], deterministic=True), never)
    assert passes.read == [20 + 150 + 19 - GRID]


def test_a_kept_beginning_answers_what_follows_in_it_only(checkpoint, load):
    """The last of the shared outputs is computed anew, because another token follows there."""
    loaded, context, shared = fresh(load(checkpoint("llama"))), some(50), some(100)
    pairs: list[Pair] = [(context, (*shared, *some(10))), (context, (*shared, *some(10)))]
    expected = [score(fresh(loaded), scoring([pair]), never)[0] for pair in pairs]
    with watched(loaded) as passes:
        found = [score(loaded, scoring([pair]), never)[0] for pair in pairs]
    assert passes.read == [159, 1 + 9]
    assert_agree(found, expected)


def test_scores_count_as_memory_and_go_with_their_beginning(checkpoint, load):
    loaded, context = fresh(load(checkpoint("llama"))), some(50)
    score(loaded, scoring([(context, some(31))]), never)
    [kept] = loaded.prefix_cache.find([context + some(1)])
    assert kept.scores.nbytes == 0
    cache = loaded.prefix_cache
    keys_values = cache.bytes - 80 * 9
    assert keys_values > 0
    assert keys_values % 80 == 0
    cache.max_bytes = cache.bytes - 1
    cache.keep([])
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_beginning_read_for_generation_gets_scores_from_a_later_chunk(checkpoint, load):
    loaded, context, shared = fresh(load(checkpoint("llama"))), some(50), some(100)
    generate(loaded, generating([context + shared], max_gen_toks=2), never)
    score(loaded, scoring([(context, (*shared, *some(10)))]), never)
    with watched(loaded) as passes:
        score(loaded, scoring([(context, (*shared, *some(10)))]), never)
    assert sum(passes.read) == 1 + 9


# ------------------------------------------------------------------------------------------------------ without a model


def scores_of(draw: st.DrawFn, size: int) -> Scores:
    scored = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return Scores.of({position: (-1.0 * position, position % 2 == 0) for position in range(size) if scored[position]})


def usable(tokens: Tokens, scores: Scores, sequence: Tokens, needed: int, grid: int) -> int:
    """By definition: the first position from `needed` on whose output nobody knows."""
    end = comparable(common_prefix(tokens, sequence), grid)
    while needed + 1 < end and is_known(scores, needed + 1):
        needed += 1
    return needed


def is_known(scores: Scores, position: int) -> bool:
    return any(not math.isnan(value) for value, _ in scores.between(position, position + 1))


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([1, 4]))
def test_finds_the_most_that_any_beginning_knows(data, grid):
    sequences = data.draw(trees())
    needed_from = data.draw(needs(sequences))
    beginnings = {
        sequence[: data.draw(st.integers(1, len(sequence)))]
        for sequence in data.draw(st.lists(st.sampled_from(sequences), max_size=4))
    }
    known = [(tokens, scores_of(data.draw, len(tokens))) for tokens in sorted(beginnings)]
    found = find_scores(sequences, needed_from, known, grid)
    for sequence, first, (needed, scores) in zip(sequences, needed_from, found, strict=True):
        assert needed == max([first, *(usable(tokens, kept, sequence, first, grid) for tokens, kept in known)])
        values = scores.between(first + 1, needed + 1)
        assert values == [(-1.0 * position, position % 2 == 0) for position in range(first + 1, needed + 1)]
        assert needed < len(sequence)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 12), st.integers(0, 12), st.integers(0, 14))
def test_together(data, own_size, other_size, end):
    own, other = scores_of(data.draw, own_size), scores_of(data.draw, other_size)
    both = own.and_those_of(other, end)
    for position in range(14):
        holders = [own] if is_known(own, position) else [other] if position < end else []
        expected = [score for scores in holders for score in scores.between(position, position + 1)]
        assert [is_known(both, position)] == [any(is_known(scores, position) for scores in holders)]
        if is_known(both, position):
            assert both.between(position, position + 1) == expected


def test_grid():
    """What is the same to the bit in sequences with so many tokens in common: whole blocks, and what they predict."""
    assert [comparable(shared, 4) for shared in (0, 3, 4, 5, 7, 8, 9)] == [0, 1, 4, 5, 5, 8, 9]
    assert [comparable(shared, 1) for shared in (0, 3, 4)] == [0, 3, 4]

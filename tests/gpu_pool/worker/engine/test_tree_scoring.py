"""Scoring along the token tree: what is computed, bounds of a pass, and what is left when it fails."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from chunks import scoring
from engine_probes import (
    assert_kept_for_the_cache_alone,
    fresh,
    kept_tensor_bytes,
    never,
    out_of_memory_beyond,
    plainly,
    tensor_bytes,
    watched,
)

from gpu_pool.worker.engine import attention, tree_scoring
from gpu_pool.worker.engine.blocks import Block
from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.packed import kept_bytes
from gpu_pool.worker.engine.rows import Answer
from gpu_pool.worker.engine.token_scores import token_log_probs
from gpu_pool.worker.engine.transfer import ToHost

Requests = list[tuple[tuple[int, ...], tuple[int, ...]]]


def few_shot(questions: int = 6, choices: int = 4) -> Requests:
    """Questions after 80 tokens of examples, each with choices of 1 to 15 tokens."""
    source = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, 300) for _ in range(count))

    examples = tokens(80)
    contexts = [(*examples, 3 + question, *tokens(10)) for question in range(questions)]
    return [(context, (3 + choice, *tokens(5 * choice))) for context in contexts for choice in range(choices)]


def answers(loaded: LoadedModel, requests: Requests, batch_size: int | None = None) -> tuple[Answer, ...]:
    return score(loaded, scoring(requests, batch_size=batch_size), never)


def assert_agree(ours: tuple[Answer, ...], theirs: tuple[Answer, ...]) -> None:
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert all(abs(own[0] - other[0]) <= 1e-5 * max(1, abs(other[0])) for own, other in zip(ours, theirs, strict=True))


@pytest.fixture
def loaded(checkpoint, load):
    """A model without anything kept from other tests."""
    return fresh(load(checkpoint("llama")))


@pytest.mark.parametrize("scored_tokens", [7, 40, 4096])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_equals_the_plain_way(batch_size, scored_tokens, loaded):
    small = fresh(loaded, scored_tokens=scored_tokens)
    with watched(small) as passes:
        ours = answers(small, few_shot(), batch_size)
    assert not passes.plain
    assert max(passes.read) <= scored_tokens
    assert_agree(ours, answers(plainly(loaded), few_shot()))


def test_distinct_tokens_are_computed_once(loaded):
    requests = few_shot()
    inputs = {(*context, *continuation[:-1]) for context, continuation in requests}
    nodes = {tokens[: end + 1] for tokens in inputs for end in range(len(tokens))}
    with watched(loaded) as passes:
        answers(loaded, requests)
        answers(loaded, requests * 5)
    assert passes.read[0] == len(nodes)
    assert sum(passes.read[1:]) < len(nodes) - 80


def test_scores_of_a_pass_are_read_when_the_next_one_is_on_its_way(loaded, monkeypatch):
    events: list[str] = []
    lists = ToHost.lists

    def read(scores):
        events.append("read")
        return lists(scores)

    monkeypatch.setattr(ToHost, "lists", read)
    hook = loaded.model.register_forward_hook(lambda *_: events.append("pass"))
    ours = answers(fresh(loaded), few_shot(), batch_size=8)
    hook.remove()
    assert events == ["pass", "pass", "read", "pass", "read", "read"]
    assert_agree(ours, answers(fresh(loaded), few_shot()))


def test_scoring_logits_does_not_wait_for_them():
    """On `meta` there is nothing to wait for: to ask for a number is an error."""
    rows, tokens = np.array([0, 1, 1, 70, 130]), np.array([5, 6, 7, 8, 9])
    logits = torch.empty(140, 50, device="meta")
    values, greedy = token_log_probs(logits, rows, tokens, torch.float32)
    assert (values.shape, values.dtype, greedy.dtype) == ((5,), torch.float64, torch.bool)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_requested_batch_size_bounds_the_sequences_of_a_pass(batch_size, loaded):
    requests = [(context, continuation) for context, continuation in few_shot() if len(continuation) > 1]
    with watched(loaded) as passes:
        answers(loaded, requests, batch_size)
    assert len(passes.read) == -(-len(requests) // batch_size)


def test_logits_of_a_pass_are_bounded(loaded):
    """Even those of one long text, all of whose tokens are scored."""
    bound = 20 * 4 * loaded.vocabulary
    small = fresh(loaded, logits_bytes=bound)
    sizes: list[int] = []
    hook = loaded.model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: sizes.append(4 * output.numel())
    )
    requests = [*few_shot(), ((5,), tuple(3 + index * index % 290 for index in range(150)))]
    ours = answers(small, requests)
    hook.remove()
    assert max(sizes) <= bound
    assert_agree(ours, answers(plainly(loaded), requests))


@pytest.mark.parametrize("most", [7, 20, 120])
def test_out_of_memory_halves_the_pass(most, loaded):
    small = fresh(loaded, scored_tokens=most)  # blocks that can be computed alone
    large = fresh(loaded)
    whole = answers(fresh(loaded), few_shot())
    with out_of_memory_beyond(loaded, read=most):
        assert_agree(answers(small, few_shot()), whole)
        if most == 120:
            assert_agree(answers(large, few_shot()), whole)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                answers(large, few_shot())
    assert_kept_for_the_cache_alone(large)
    assert_agree(answers(large, few_shot()), whole)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (torch.AcceleratorError, "CUDA error: out of memory"),
    ],
)
def test_what_is_too_much_is_learnt_once_a_chunk_whoever_says_so(error, message, loaded):
    requests = few_shot(questions=20)
    whole = answers(fresh(loaded), requests)
    small = fresh(loaded, scored_tokens=160)
    with out_of_memory_beyond(loaded, read=130, error=error, message=message) as failures, watched(loaded) as passes:
        assert_agree(answers(small, requests), whole)
    assert len(failures) == 1
    assert len(passes.read) > 5
    assert_kept_for_the_cache_alone(small)


@pytest.mark.parametrize("deterministic", [False, True])
def test_kept_beginnings_are_given_up_where_memory_does_not_suffice_for_a_block(deterministic, loaded):
    chunk = scoring(few_shot(), deterministic=deterministic)
    whole = score(fresh(loaded), chunk, never)
    score(loaded, scoring(few_shot(questions=1)), never)
    planned = loaded.limits.scored_tokens

    def fail(module, args, kwargs):
        if len(loaded.prefix_cache):
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(fail, with_kwargs=True)
    assert_agree(score(loaded, chunk, never), whole)
    hook.remove()
    assert deterministic or loaded.limits.scored_tokens < planned, "batches are halved first"
    assert_kept_for_the_cache_alone(loaded)


def test_a_failed_pass_leaves_no_keys_and_values(loaded):
    """It fails in the second layer: those of the first are gone when its first half is tried."""
    failed: list[Block] = []
    left: list[int] = []

    def fail_once(module, args, kwargs):
        assert attention._plan is not None
        if not failed and len(attention._plan.starts) > 1:
            failed.extend(block for block in attention._plan.starts if kept_bytes(block))
            raise torch.OutOfMemoryError("CUDA out of memory")

    def look(module, args, kwargs):
        if failed:
            left.append(sum(map(kept_bytes, failed)))

    hooks = [
        loaded.model.model.layers[1].register_forward_pre_hook(fail_once, with_kwargs=True),
        loaded.model.register_forward_pre_hook(look, with_kwargs=True),
    ]
    whole = answers(loaded, few_shot())
    for hook in hooks:
        hook.remove()
    assert len(failed) > 1
    assert left[0] == 0
    assert_agree(whole, answers(fresh(loaded), few_shot()))


@pytest.mark.parametrize("tokens", [0, 150])
def test_keys_and_values_that_are_held_leave_less_room(tokens, loaded):
    """But what a pass cannot do without, and what nobody looks back at, is computed however little there is."""
    small = fresh(loaded, held_bytes=tokens * loaded.token_bytes, prefix_bytes=0)
    whole = answers(fresh(loaded), few_shot(questions=20))
    held: list[int] = []

    def look(module, args, kwargs):
        assert attention._plan is not None
        sources = {block for member in attention._plan.starts for block, _ in member.path.sources}
        held.append(sum(map(kept_bytes, sources)) + sum(block.reach for block in attention._plan.starts if block.users))

    hook = loaded.model.register_forward_pre_hook(look, with_kwargs=True)
    with watched(loaded) as passes:
        assert_agree(answers(small, few_shot(questions=20)), whole)
    hook.remove()
    with watched(loaded) as free:
        answers(fresh(loaded), few_shot(questions=20))
    assert len(passes.read) > len(free.read)
    assert max(held) <= max(tokens, 150) * loaded.token_bytes
    assert max(passes.read) > 1


def test_out_of_memory_after_the_pass(loaded, monkeypatch):
    """Blocks are let go only when their batch is wholly done: halves look back at what the failed attempt did."""
    whole = answers(fresh(loaded), few_shot())
    reduce, failures = tree_scoring.token_log_probs, iter([True, True])

    def fail_twice(*args):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reduce(*args)

    monkeypatch.setattr(tree_scoring, "token_log_probs", fail_twice)
    small = fresh(loaded, scored_tokens=150)
    assert_agree(answers(small, few_shot()), whole)
    assert_kept_for_the_cache_alone(small)


@pytest.mark.parametrize("passes", range(6))
def test_cancelled_in_the_middle(passes, loaded):
    """Nothing stays that was not there before, and what was there is still of use."""
    examples = few_shot()[0][0][:80]
    answers(loaded, [(examples, (5,))])
    asked = iter([False] * passes)
    before = loaded.prefix_cache.bytes
    with pytest.raises(Cancelled):
        score(loaded, scoring(few_shot(), batch_size=2), lambda: next(asked, True))
    assert loaded.prefix_cache.bytes == before
    assert_kept_for_the_cache_alone(loaded)
    with watched(loaded) as seen:
        ours = answers(loaded, few_shot())
    assert sum(seen.read) < 80 + sum(len(continuation) + 10 for _, continuation in few_shot())
    assert_agree(ours, answers(fresh(loaded), few_shot()))


def test_keys_and_values_are_let_go(loaded):
    """But those that the prefix cache holds: by reference counts alone, without collecting garbage."""
    answers(fresh(loaded), few_shot())
    before = tensor_bytes()
    for scored_tokens in (40, 4096):
        small = fresh(loaded, scored_tokens=scored_tokens)
        answers(small, few_shot())
        assert small.prefix_cache.bytes > 0
        assert tensor_bytes() - before == kept_tensor_bytes(small)
        small.prefix_cache.clear()
        assert tensor_bytes() == before


def test_a_block_that_is_too_much_is_laid_out_anew(loaded):
    """One document longer than memory allows in one pass, among short ones; what is found is remembered."""
    document = tuple(3 + index % 300 for index in range(250))
    requests: Requests = [(document[:100], document[100:]), *few_shot()[:8]]
    whole = answers(loaded, requests)
    loaded = fresh(loaded)
    with out_of_memory_beyond(loaded, read=140):
        assert_agree(answers(loaded, requests), whole)
        assert loaded.limits.scored_tokens < 250

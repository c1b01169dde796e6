"""Log-likelihoods of decoder-only models against lm-eval's HF backend."""

import dataclasses

import pytest
from architectures import PLAIN
from chunks import scoring
from engine_probes import fresh, out_of_memory_beyond, plainly, watched
from lm_eval_answers import (
    PROMPTS,
    VOCABULARY,
    answers,
    assert_agree,
    lm_eval_answers,
    lm_eval_texts,
    make_requests,
    texts,
)

from gpu_pool.worker.engine.cancellation import Cancelled
from gpu_pool.worker.engine.company import Company
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.routes import Route


def test_equals_lm_eval_in_batches(checkpoint, load, reference):
    requests = make_requests(40)
    theirs = lm_eval_answers(reference(checkpoint("llama"), batch_size=7), requests)
    assert_agree(answers(load(checkpoint("llama")), requests), theirs)


def test_greedy_flag_needs_every_token_to_be_the_most_likely(checkpoint, load):
    loaded = load(checkpoint("llama"))

    def most_likely_after(context: tuple[int, ...]) -> int:
        flags = [greedy for _, greedy in answers(loaded, tuple((context, (token,)) for token in range(VOCABULARY)))]
        assert flags.count(True) == 1
        return flags.index(True)

    context = (5, 6, 7)
    first = most_likely_after(context)
    second = most_likely_after((*context, first))
    pairs = ((first, second), (first, second + 1), (first + 1, second))
    assert [greedy for _, greedy in answers(loaded, tuple((context, pair) for pair in pairs))] == [True, False, False]


def test_long_contexts_lose_their_beginning(checkpoint, load, reference):
    requests = make_requests(20, longest=60)
    theirs = lm_eval_answers(reference(checkpoint("llama"), max_length=16), requests)
    assert_agree(answers(load(checkpoint("llama"), max_length=16), requests), theirs)


def test_model_without_logits_to_keep_agrees(checkpoint, load):
    loaded = load(checkpoint("llama"))
    requests = make_requests(20)
    whole = dataclasses.replace(loaded, forward_names=loaded.forward_names - {"logits_to_keep"})
    assert_agree(answers(whole, requests), answers(loaded, requests))


def test_equal_inputs_share_a_row(checkpoint, load):
    loaded = load(checkpoint("llama"))
    requests = tuple(((4, 5, 6), (choice,)) for choice in range(10, 14))
    with watched(loaded) as passes:
        answers(fresh(loaded), requests)
        answers(plainly(loaded), requests)
    assert (passes.read, passes.plain) == ([3], [3])


def test_batches_are_bounded(checkpoint, load):
    loaded = plainly(fresh(load(checkpoint("llama")), scored_tokens=64))
    with watched(loaded) as passes:
        answers(loaded, make_requests(30, longest=30))
    assert max(passes.plain) <= 64
    assert len(passes.plain) < 30


@pytest.mark.parametrize("batch_size", [1, 7, None])
def test_rows_that_look_at_padding_are_not_padded(batch_size, checkpoint, load, reference):
    loaded = load(checkpoint("xlnet"), max_length=64)
    requests = make_requests(30, longest=5)
    with watched(loaded) as passes:
        ours = answers(loaded, requests, batch_size)
    assert loaded.scoring_company is Company.EQUAL_LENGTH
    assert_agree(ours, lm_eval_answers(reference(checkpoint("xlnet"), max_length=64), requests))
    assert batch_size == 1 or len(passes.plain) < len(requests)


def test_rows_that_look_at_padding_only_beyond_a_window_are_not_padded(checkpoint, load, reference):
    loaded = load(checkpoint("doge"))
    assert loaded.route[0] is Route.PLAIN
    assert loaded.scoring_company is not Company.ANY_LENGTH
    assert loaded.company is not Company.ANY_LENGTH
    requests = make_requests(30)
    assert_agree(answers(loaded, requests), lm_eval_answers(reference(checkpoint("doge")), requests))
    theirs = lm_eval_texts(reference(checkpoint("doge")), PROMPTS, max_gen_toks=8)
    assert texts(loaded, PROMPTS, max_gen_toks=8) == theirs


@pytest.mark.parametrize(("scored_tokens", "longest"), [(64, 28), (32, 12)])
def test_padding_is_tried_as_far_as_two_rows_may_share_a_batch(scored_tokens, longest, checkpoint, load):
    """Beyond a window of 16 tokens, where batches get that wide."""
    loaded = fresh(load(checkpoint("gpt_neo")), scored_tokens=scored_tokens)
    with watched(loaded) as passes:
        assert loaded.scoring_company is Company.ANY_LENGTH
    assert max(passes.plain) == 2 * longest


@pytest.mark.parametrize("name", PLAIN)
def test_padding_behind_a_causal_row_changes_nothing(name, checkpoint, load):
    assert load(checkpoint(name)).scoring_company is Company.ANY_LENGTH


def test_out_of_memory_halves_the_batch(checkpoint, load):
    loaded = plainly(load(checkpoint("llama")))
    requests = make_requests(9)
    whole = answers(loaded, requests)
    with watched(loaded) as passes, out_of_memory_beyond(loaded, read=100):
        assert_agree(answers(loaded, requests), whole)
    assert max(passes.plain) > 100


@pytest.mark.parametrize(
    ("context", "continuation", "problem"),
    [
        ((), (1,), "empty"),
        ((1,), (), "empty"),
        ((1,), (1,) * 300, "exceeds the context of 256"),
        ((100_000,), (1,), "token ids must lie in"),
        ((-1,), (1,), "token ids must be unsigned"),
    ],
)
def test_refused(context, continuation, problem, checkpoint, load):
    with pytest.raises(ValueError, match=problem):
        answers(load(checkpoint("llama")), ((context, continuation),))


def test_cancelled_before_the_next_batch(checkpoint, load):
    asked = iter([False, False, True])
    chunk = scoring(make_requests(9), batch_size=1)
    with pytest.raises(Cancelled):
        score(load(checkpoint("llama")), chunk, lambda: next(asked))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, None])
def test_real_model_equals_lm_eval(batch_size, smollm2, load, reference):
    theirs_model = reference(smollm2)
    texts = [
        ("Question: What is the capital of France?\nAnswer:", [" Paris", " Lyon", " the city of Berlin"]),
        ("The chemical symbol of gold is", [" Au", " Ag"]),
    ]
    requests = tuple(
        tuple(map(tuple, theirs_model._encode_pair(context, continuation)))
        for context, continuations in texts
        for continuation in continuations
    )
    assert_agree(answers(load(smollm2), requests, batch_size), lm_eval_answers(theirs_model, requests))


@pytest.mark.parametrize("way", [fresh, plainly])
def test_what_memory_did_not_suffice_for_is_not_tried_again(way, checkpoint, load):
    requests = make_requests(30)
    whole = answers(way(load(checkpoint("llama"))), requests)
    loaded = way(fresh(load(checkpoint("llama"))))
    with out_of_memory_beyond(loaded, read=130) as failures:
        assert_agree(answers(loaded, requests), whole)
        assert failures
        failures.clear()
        loaded.prefix_cache.clear()
        assert_agree(answers(loaded, requests), whole)
        assert not failures

import random
from collections.abc import Sequence
from typing import Any

import pytest

from gpu_pool.messages import LoglikelihoodChunk
from gpu_pool.worker.engine import batching
from gpu_pool.worker.engine.batching import Cancelled
from gpu_pool.worker.engine.loglikelihood import score

Requests = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
VOCABULARY = 300


def make_requests(count: int, longest: int = 60, seed: int = 0) -> Requests:
    """Random pairs; every third context is shared by continuations of several lengths, two of them one token long."""
    source = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, VOCABULARY) for _ in range(source.randint(low, high)))

    requests: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    while len(requests) < count:
        context = tokens(1, longest)
        requests.append((context, tokens(1, 8)))
        if len(requests) % 3 == 0:
            requests += [(context, tokens(1, 1)), (context, tokens(1, 1)), (context[:-1] or context, context[-1:])]
    source.shuffle(requests)
    return tuple(requests[:count])


def never() -> bool:
    return False


def answers(loaded: Any, requests: Requests, batch_size: int | None = None) -> tuple[tuple[float, bool], ...]:
    return score(loaded, LoglikelihoodChunk(chunk_id=1, requests=requests, batch_size=batch_size), never)


def expected(reference: Any, requests: Requests) -> list[tuple[float, bool]]:
    pairs = [(("", ""), list(context), list(continuation)) for context, continuation in requests]
    return reference._loglikelihood_tokens(pairs, disable_tqdm=True)


def assert_agree(ours: Sequence[tuple[float, bool]], theirs: Sequence[tuple[float, bool]]) -> None:
    """1e-5 relative to max(1, |log-probability|), and the same greedy flags."""
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (our_value, _), (their_value, _) in zip(ours, theirs, strict=True):
        assert abs(our_value - their_value) <= 1e-5 * max(1.0, abs(their_value))


@pytest.mark.parametrize("batch_size", [1, 7, None])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "mistral", "mamba", "rwkv"])
def test_equals_lm_eval(model_type, batch_size, checkpoint, load, reference):
    requests = make_requests(40)
    theirs = expected(reference(checkpoint(model_type)), requests)
    assert_agree(answers(load(checkpoint(model_type)), requests, batch_size), theirs)


def test_equals_lm_eval_in_batches(checkpoint, load, reference):
    requests = make_requests(40)
    theirs = expected(reference(checkpoint("llama"), batch_size=7), requests)
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
    theirs = expected(reference(checkpoint("llama"), max_length=16), requests)
    assert_agree(answers(load(checkpoint("llama"), max_length=16), requests), theirs)


def test_model_without_logits_to_keep_agrees(checkpoint, load):
    import dataclasses

    loaded = load(checkpoint("llama"))
    requests = make_requests(20)
    whole = dataclasses.replace(loaded, forward_names=loaded.forward_names - {"logits_to_keep"})
    assert_agree(answers(whole, requests), answers(loaded, requests))


def test_equal_inputs_share_a_row(checkpoint, load):
    loaded = load(checkpoint("llama"))
    rows: list[int] = []
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    answers(loaded, tuple(((4, 5, 6), (choice,)) for choice in range(10, 14)))
    hook.remove()
    assert rows == [1]


def test_batches_are_bounded(checkpoint, load):
    import dataclasses

    loaded = load(checkpoint("llama"))
    small = dataclasses.replace(loaded, limits=dataclasses.replace(batching.CPU_LIMITS, scored_tokens=64))
    cells: list[int] = []
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: cells.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answers(small, make_requests(30, longest=30))
    hook.remove()
    assert max(cells) <= 64
    assert len(cells) < 30


def test_out_of_memory_halves_the_batch(checkpoint, load):
    import torch

    loaded = load(checkpoint("llama"))
    requests = make_requests(9)
    whole = answers(loaded, requests)

    def three_rows_at_most(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = loaded.model.register_forward_pre_hook(three_rows_at_most, with_kwargs=True)
    halved = answers(loaded, requests)
    hook.remove()
    assert_agree(halved, whole)


@pytest.mark.parametrize(
    ("context", "continuation", "problem"),
    [
        ((), (1,), "empty"),
        ((1,), (), "empty"),
        ((1,), (1,) * 300, "exceeds the context of 256"),
        ((100_000,), (1,), "token ids must lie in"),
        ((-1,), (1,), "token ids must lie in"),
    ],
)
def test_refused(context, continuation, problem, checkpoint, load):
    with pytest.raises(ValueError, match=problem):
        answers(load(checkpoint("llama")), ((context, continuation),))


def test_cancelled_before_the_next_batch(checkpoint, load):
    asked = iter([False, False, True])
    chunk = LoglikelihoodChunk(chunk_id=1, requests=make_requests(9), batch_size=1)
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
    assert_agree(answers(load(smollm2), requests, batch_size), expected(theirs_model, requests))

"""The same requests to our engine and to lm-eval's HF backend, and whether the answers agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from chunks import Request, generating, scoring
from engine_probes import never

from gpu_pool.worker.engine.generation import generate
from gpu_pool.worker.engine.loaded_model import LoadedModel
from gpu_pool.worker.engine.loglikelihood import score
from gpu_pool.worker.engine.rows import Answer

VOCABULARY = 300
"""Token ids that the tiny models know."""
FEW_REQUESTS: tuple[Request, ...] = (((5, 6, 7), (8,)), ((5, 6, 7, 9), (9, 10)), ((20,), (21, 22, 23)))
PROMPTS = [
    "Question: what is the capital of France?",
    "Paris",
    "the city of Paris, of course, and which of these is it? " * 3,
    "A",
    "which of these is it?\nAnswer:",
    "Answer: the city",
    "0123456789",
    "of course of course",
    "is it, is it, is it?",
]


def make_requests(count: int, longest: int = 60, seed: int = 0) -> tuple[Request, ...]:
    """Random ones; after every third context there are several continuations, which begin alike or are one token long.

    One of them is the last token of its own context, so that its whole sequence is another's context.
    """
    source = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(source.randrange(3, VOCABULARY) for _ in range(source.randint(low, high)))

    requests: list[Request] = []
    for number in range(count):
        context, continuation = tokens(1, longest), tokens(1, 8)
        requests.append((context, continuation))
        if number % 3 == 0:
            requests += [(context, tokens(1, 1)), (context, tokens(1, 1)), (context[:-1] or context, context[-1:])]
            requests += [(context, continuation[:2]), (context, (*continuation[:3], 7))]
    requests = requests[:count]
    source.shuffle(requests)
    return tuple(requests)


def answers(loaded: LoadedModel, requests: Sequence[Request], batch_size: int | None = None) -> tuple[Answer, ...]:
    """Our log-likelihoods."""
    return score(loaded, scoring(requests, batch_size=batch_size), never)


def lm_eval_answers(reference: Any, requests: Sequence[Request]) -> list[Answer]:
    """Those of an `HFLM`."""
    pairs = [(("", ""), list(context), list(continuation)) for context, continuation in requests]
    return reference._loglikelihood_tokens(pairs, disable_tqdm=True)


def values(loaded: LoadedModel, batch_size: int | None = None) -> list[float]:
    """Our log-likelihoods of `FEW_REQUESTS`."""
    return [value for value, _ in answers(loaded, FEW_REQUESTS, batch_size)]


def lm_eval_values(reference: Any) -> list[float]:
    """Those of an `HFLM`."""
    return [value for value, _ in lm_eval_answers(reference, FEW_REQUESTS)]


def assert_agree(ours: Sequence[Answer], theirs: Sequence[Answer]) -> None:
    """1e-5 relative to max(1, |log-probability|), and the same greedy flags."""
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    for (our_value, _), (their_value, _) in zip(ours, theirs, strict=True):
        assert abs(our_value - their_value) <= 1e-5 * max(1.0, abs(their_value))


def texts(
    loaded: LoadedModel,
    prompts: Sequence[str],
    batch_size: int | None = None,
    seeds: tuple[int, ...] = (),
    **options: Any,
) -> tuple[str, ...]:
    """Our continuations."""
    ids = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    return generate(loaded, generating(ids, seeds=seeds, batch_size=batch_size, **options), never)


def lm_eval_texts(reference: Any, prompts: Sequence[str], **gen_kwargs: Any) -> tuple[str, ...]:
    """Those of an `HFLM`."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, dict(gen_kwargs)), idx=index)
        for index, prompt in enumerate(prompts)
    ]
    return tuple(reference.generate_until(requests, disable_tqdm=True))

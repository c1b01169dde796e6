"""Answers of every architecture, by either way, against lm-eval's HF backend.

Beginnings that requests share are longer than the models' windows.
"""

from __future__ import annotations

import random

import pytest
from architectures import PLAIN, TREE
from engine_probes import attending_by_lengths, fresh
from lm_eval_answers import VOCABULARY, answers, assert_agree, lm_eval_answers, lm_eval_texts, texts

from gpu_pool.worker.engine.routes import Route, choose_route
from gpu_pool.worker.engine.varlen_kernels import attend_varlen_plain

BATCH_SIZES = [1, 7, None]
NEW_TOKENS = 12


def tokens(source: random.Random, low: int, high: int) -> tuple[int, ...]:
    return tuple(source.randrange(3, VOCABULARY) for _ in range(source.randint(low, high)))


def make_requests() -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Questions after few-shot examples, with choices that begin alike; and some that share nothing."""
    source = random.Random(0)
    examples = [tokens(source, 60, 60), tokens(source, 25, 25)]
    requests: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for question in range(5):
        context = examples[question % 2] + tokens(source, 1, 30)
        choice = tokens(source, 1, 4)
        requests += [(context, choice), (context, choice + tokens(source, 1, 20)), (context, tokens(source, 1, 1))]
    requests += [(tokens(source, 1, 1), tokens(source, 3, 3)), (tokens(source, 40, 40), tokens(source, 1, 1))]
    source.shuffle(requests)
    return requests


PROMPTS = [
    "Which of these is it? " * 3 + question
    for question in ["What is the capital of France?", "What is it?", "Of course, of course: the city of Paris", "W"]
] + ["A", "0123456789 " * 7]


@pytest.mark.parametrize("name", [*TREE, *PLAIN])
def test_equals_lm_eval(name, checkpoint, load, reference):
    loaded, theirs = load(checkpoint(name)), reference(checkpoint(name))
    assert loaded.route[0] == ("tree" if name in TREE else "plain")
    requests = make_requests()
    expected, expected_texts = (
        lm_eval_answers(theirs, requests),
        lm_eval_texts(theirs, PROMPTS, max_gen_toks=NEW_TOKENS),
    )
    assert len(set(expected_texts)) > 3
    for batch_size in BATCH_SIZES:
        assert_agree(answers(loaded, requests, batch_size), expected)
        assert texts(loaded, PROMPTS, batch_size, max_gen_toks=NEW_TOKENS) == expected_texts


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("qwen2", {attend_varlen_plain}),  # heads that share keys
        ("mistral", {attend_varlen_plain}),  # a window
        ("gpt_oss", {attend_varlen_plain}),  # sinks, and a window in every other layer
        ("gemma2", {None}),  # a soft-cap, which the kernels for variable lengths do not know
        ("deepseek_v3", {None}),  # values of another dimension
    ],
)
def test_equals_lm_eval_as_on_a_gpu(name, kernels, checkpoint, load, reference):
    """Blocks attended to by their lengths, by the plain kernel."""
    loaded, theirs = load(checkpoint(name)), reference(checkpoint(name))
    requests = make_requests()
    expected = lm_eval_answers(theirs, requests)
    expected_texts = lm_eval_texts(theirs, PROMPTS, max_gen_toks=NEW_TOKENS)
    with attending_by_lengths() as chosen:
        assert choose_route(loaded)[0] == Route.TREE
        for batch_size in BATCH_SIZES:
            assert_agree(answers(fresh(loaded), requests, batch_size), expected)
            assert texts(fresh(loaded), PROMPTS, batch_size, max_gen_toks=NEW_TOKENS) == expected_texts
    assert set(chosen) == kernels
